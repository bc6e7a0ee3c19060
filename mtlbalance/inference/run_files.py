"""The folder of a finished run, read without changing it: config, results and weights, or why they cannot be used."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mtlbalance.config import load_config
from mtlbalance.errors import RunFolderError
from mtlbalance.training.checkpoints import Checkpoints
from mtlbalance.training.results import RESULTS_SCHEMA
from mtlbalance.training.run_folder import RunFolder, differing_keys
from mtlbalance.training.sums import damaged_files

if TYPE_CHECKING:
    from mtlbalance.config import RunConfig

Weights: TypeAlias = Literal["ema", "last", "live"]
_CHECKPOINT_PART: dict[Weights, str] = {"last": "ema.module.", "live": "model."}
_CANNOT_BE_TOLD = "put it back from a backup, or train again"


def read_results(path: Path) -> dict[str, Any]:
    """Return the results of the finished run in ``path``.

    Raises:
        RunFolderError: there is no such folder, it is no run's, the run has not finished, a file is damaged, or
            another version of mtlbalance made it.
    """
    folder = RunFolder(path)
    if not path.exists():
        raise RunFolderError(f"there is no run folder {path}")
    if not path.is_dir():
        raise RunFolderError(f"{path} is a file; name the run's folder, the one that holds results.json")
    if not folder.config_path.exists():
        raise _not_a_run(path)
    if not folder.results_path.exists():
        raise RunFolderError(
            f"the run in {path} has not finished: it has no results.json; "
            f"'mtlbalance run {folder.config_path} --out {path}' goes on with it"
        )
    if damaged := damaged_files(path):
        raise RunFolderError(
            f"in {path}, these files are not what sums.json says they were: {', '.join(damaged)}; put them back from "
            f"a backup, or let 'mtlbalance run {folder.config_path} --out {path}' make them again"
        )
    results = _read_json(folder.results_path)
    if results.get("schema") != RESULTS_SCHEMA:
        raise RunFolderError(
            f"{folder.results_path} has schema {results.get('schema')!r}, made by another version of mtlbalance; this "
            f"one reads {RESULTS_SCHEMA}"
        )
    missing = [key for key in ("run", "best_epoch", "epochs_run", "config_hash") if key not in results]
    if missing:
        raise RunFolderError(f"{folder.results_path} has no {missing[0]!r}; {_CANNOT_BE_TOLD}")
    return results


def read_config(path: Path, results: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    """Return the config of the run in ``path``, held to the hash in its results.

    Args:
        path: the run's folder.
        results: of the run.
        overrides: for what does not decide the result, such as ``dataset.data_dir=...`` on another machine.

    Raises:
        InvalidConfigError: it cannot be read, or its plugins are not here.
        RunFolderError: it is not the config that the run was trained with.
    """
    folder = RunFolder(path)
    config = load_config(folder.config_path, overrides)
    if (
        config.result_hash(results.get("data_source", ""), results.get("protocol", ""))
        == results["config_hash"]
    ):
        return config
    if overrides:
        kept = load_config(folder.config_path)
        changed = differing_keys(kept.to_dict(), config.to_dict(), config.free_keys())
        if changed:
            raise RunFolderError(
                f"the run in {path} was trained with other options, which decide its result (there -> here):\n"
                + "\n".join(f"  {line}" for line in changed)
            )
    raise RunFolderError(
        f"{folder.config_path} does not have the config_hash in results.json: it was changed after the run, or "
        f"mtlbalance or a plugin reads it differently than the version that wrote it; {_CANNOT_BE_TOLD}"
    )


def read_weights(path: Path, results: Mapping[str, Any], which: Weights) -> dict[str, Tensor]:
    """Return the weights that ``which`` names, by parameter name.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    if which == "ema":
        file = path / "model.safetensors"
        try:
            return safetensors.torch.load(file.read_bytes())
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise RunFolderError(f"cannot read the weights in {file}: {error}; {_CANNOT_BE_TOLD}") from error
    epoch = results["epochs_run"] - 1
    saved = Checkpoints(path / "checkpoints").end_of_epoch(epoch)
    if saved is None:
        raise RunFolderError(
            f"the weights {which!r} are in the checkpoint of epoch {epoch}, which is gone or damaged in "
            f"{path / 'checkpoints'}; the weights 'ema' are in model.safetensors"
        )
    prefix = _CHECKPOINT_PART[which]
    return {
        name.removeprefix(prefix): value for name, value in saved.weights.items() if name.startswith(prefix)
    }


def check_data(path: Path, described: Mapping[str, Any]) -> None:
    """Raise RunFolderError unless ``described`` is the fingerprint of the data that the run was trained on."""
    before = _read_json(RunFolder(path).data_path)
    if changed := differing_keys(before, described, frozenset()):
        raise RunFolderError(
            f"the run in {path} was trained on other data than there is here (there -> here):\n"
            + "\n".join(f"  {line}" for line in changed)
        )


def check_output(run_dir: Path, out: Path, *, reads: Path | None = None) -> None:
    """Raise RunFolderError if ``out`` is no file, or one that belongs to the run, or the one that is read.

    What is written takes the name of what was there: ``/dev/null`` would no longer be a device.
    """
    try:
        what = out.stat().st_mode
    except OSError:  # not there yet; why it cannot be, if it cannot, is said by who writes it
        what = stat.S_IFREG
    if not stat.S_ISREG(what):
        raise RunFolderError(
            f"{out} is {'a folder' if stat.S_ISDIR(what) else 'no ordinary file'}; name a file"
        )
    own, target = run_dir.resolve(), out.resolve()
    if reads is not None and target == reads.resolve():
        raise RunFolderError(f"{out} is the file to be read; choose another name")
    if target.is_relative_to(own / "checkpoints") or (target.parent == own and target.name in _OWN_FILES):
        raise RunFolderError(f"{out} is one of the run's own files; choose another name")


_OWN_FILES = frozenset(
    {
        "config.resolved.toml", "environment.json", "data.json", "metrics.csv", "gradient_stats.csv",
        "model.safetensors", "log.jsonl", "results.json", "sums.json",
    }
)  # fmt: skip


def _not_a_run(path: Path) -> RunFolderError:
    if (path / "plan.json").exists():
        inside = f"it is a sweep's; name one of its runs ('mtlbalance sweep status {path}' lists them)"
    elif any(path.glob("seed_*/config.resolved.toml")):
        seeds = ", ".join(sorted(found.parent.name for found in path.glob("seed_*/config.resolved.toml")))
        inside = f"name the folder of one seed in it: {seeds}"
    else:
        inside = "it has no config.resolved.toml"
    return RunFolderError(f"{path} is not a run folder: {inside}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(f"cannot read {path}: {error}; {_CANNOT_BE_TOLD}") from error
