"""Where a run was made: ``environment.json``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mtlbalance.training.devices import device_name
from mtlbalance.training.precision import own_matmul_precision
from mtlbalance.training.sums import sha256

_DECIDES_DIGITS = ("torch", "cuda", "cpu_capability", "num_threads", "matmul_precision", "device")


def describe_environment(device: torch.device, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """Return versions, machine, device, git commit of the current folder (if any) and command line.

    Args:
        device: where the run computes.
        plugins: those that its config lists; files are told by their SHA-256 sums.
    """
    return {
        "plugins": {
            plugin: sha256(Path(plugin).read_bytes()) for plugin in plugins if Path(plugin).is_file()
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "matmul_precision": own_matmul_precision(),
        "device": device_name(device),
        "git_commit": _git_commit(),
        "command": sys.argv,
        "packages": {
            dist.metadata["Name"]: dist.version
            for dist in sorted(
                importlib.metadata.distributions(), key=lambda dist: str(dist.metadata["Name"]).lower()
            )
            if dist.metadata["Name"]
        },
    }


def changed_environment(path: Path, now: Mapping[str, Any], packages: Iterable[str]) -> list[str]:
    """Return ``what: there -> here`` for what may give a run other digits where it goes on than where it began.

    Args:
        path: its ``environment.json``; one that is gone or damaged says nothing.
        now: the environment here.
        packages: the names of those that bring its plugins.
    """
    try:
        before = json.loads(path.read_bytes())
        old, new = (_digits(environment, packages) for environment in (before, now))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    return [f"{what}: {was} -> {new[what]}" for what, was in old.items() if what in new and was != new[what]]


def _digits(environment: Mapping[str, Any], packages: Iterable[str]) -> dict[str, Any]:
    decides = {key: environment[key] for key in _DECIDES_DIGITS if key in environment}
    decides |= {name: environment["packages"].get(name) for name in ("mtlbalance", "numpy", *packages)}
    return decides | {Path(name).name: found for name, found in environment.get("plugins", {}).items()}


def _git_commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        found = subprocess.run(
            [git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
