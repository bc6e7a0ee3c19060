"""A dataset whose runs end in the ways that a sweep must survive, and an observer that holds a run up."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from mtlbalance.plugins import DatasetRegistration, EngineRegistration, PluginConfig, hookimpl
from mtlbalance.plugins.builtins import ToyOptions, build_toy, toy_tasks


class Options(PluginConfig):
    places: ClassVar[frozenset[str]] = frozenset({"traces"})

    behaviour: str = "fine"
    shift: float = 0.0
    traces: Path = Path("traces")


def tasks(options: Options) -> Any:
    """Behave when a run asks, which is before it imports torch; what happens once leaves a trace."""
    if sys.argv[1:2] == ["run"]:
        options.traces.mkdir(exist_ok=True)
        first = not (trace := options.traces / options.behaviour).exists()
        trace.touch()
        match options.behaviour:
            case "exits":
                os._exit(7)
            case "raises":
                raise ValueError("no such file, says the plugin")
            case "killed-once" if first:
                os.kill(os.getpid(), signal.SIGKILL)
            case "out-of-memory-once" if first:
                print("error: CUDA out of memory. Tried to allocate 2.00 GiB", flush=True)
                os._exit(1)
            case "hangs":
                time.sleep(600)
    return toy_tasks(ToyOptions())


def build(options: Options) -> Any:
    return build_toy(ToyOptions(samples=60, features=2))


@hookimpl
def register_datasets() -> list[DatasetRegistration]:
    return [DatasetRegistration("behaves", "behaves", Options, build, tasks)]


class EngineOptions(PluginConfig):
    place: str = "far away"


def build_engine(options: EngineOptions) -> Any:
    raise AssertionError("an engine may start a cluster: only a sweep that runs builds it")


@hookimpl
def register_engines() -> list[EngineRegistration]:
    return [EngineRegistration("remote", "must not be built", EngineOptions, build_engine)]


@hookimpl
def on_epoch_end(run_dir: Path, epoch: int, metrics: Any) -> None:
    """Hold a run up after its first epoch while a file ``hold`` lies beside the sweep's folder."""
    hold = Path("hold")
    while hold.exists() and run_dir.name == "seed_2" and epoch == 0:
        time.sleep(0.02)
