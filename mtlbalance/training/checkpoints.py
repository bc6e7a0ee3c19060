"""Checkpoints that survive a kill at any moment: one an epoch, and more inside a long one.

``epoch_00012`` is the end of epoch 12, ``epoch_00013_at_0000400`` lies 400 batches into epoch 13. Each is three files:
``.safetensors`` with the live and the averaged weights, ``.pt`` with the rest of the run's state, and ``.json``,
written after both, with their SHA-256 sums: it is what makes a checkpoint complete. ``best_00009.safetensors`` holds
the best weights so far, which a checkpoint's sums cover too. The last two checkpoints, the last one at an epoch's
end and what they refer to are kept, and of the best epoch's checkpoint the weights: where the best ones are damaged,
they are taken from there.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mtlbalance.errors import CheckpointError
from mtlbalance.training import atomic
from mtlbalance.training.state import RunState
from mtlbalance.training.sums import sha256

_KEPT = 2
_SCHEMA = 2
_NAME = re.compile(r"epoch_(\d+)(?:_at_(\d+))?\.json")
_EMA = "ema.module."  # what the averaged weights are called in a checkpoint
_PARTS = (".safetensors", ".pt", ".json")  # in the order in which they are written


@dataclass(frozen=True)
class SavedRun:
    """What ``RunState.load_state_dict`` takes."""

    weights: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._best_sum = (
            ""  # of the best weights, from when they were made: a file damaged since is not blessed
        )

    def save(self, state: RunState, generators: Sequence[dict[str, Any]], *, is_best: bool = False) -> None:
        """Write a checkpoint of ``state``, then remove those that are no longer needed.

        Args:
            state: the run, between two steps.
            generators: the ``rng_state`` of every rank.
            is_best: whether the epoch that just ended is the best so far.
        """
        with atomic.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        sums: dict[str, str] = {}
        if state.best.epoch is not None:
            best = self.best_path(state.best.epoch)
            if is_best:
                content = weights_bytes(state.ema.module)
                self._best_sum = sha256(content)
                atomic.write_bytes(best, content, sync=False)
            sums[best.name] = self._best_sum
        name = checkpoint_name(state)
        buffer = io.BytesIO()
        torch.save(state.state_dict(generators), buffer)
        for suffix, content in ((".safetensors", _safetensors(state.weights())), (".pt", buffer.getvalue())):
            sums[name + suffix] = sha256(content)
            atomic.write_bytes(self.folder / (name + suffix), content, sync=False)
        manifest = {"schema": _SCHEMA, "epoch": state.epoch, "step": state.step, "sha256": sums}
        atomic.write_text(self.folder / f"{name}.json", json.dumps(manifest, indent=2) + "\n")
        with atomic.writing(self.folder):
            self._prune()

    def best_path(self, epoch: int) -> Path:
        """Return where the weights of the best epoch lie."""
        return self.folder / f"best_{epoch:05d}.safetensors"

    def best_weights(self, epoch: int) -> bytes:
        """Return the weights of the best epoch, once a checkpoint was saved or read.

        Where their file is damaged, it is made again from the checkpoint of their epoch, with a warning.

        Raises:
            CheckpointError: they are in neither, or not as they were written.
        """
        path = self.best_path(epoch)
        own = _read_or_nothing(path)
        if sha256(own) == self._best_sum:
            return own
        content = self._from_twin(path.name, self._best_sum)
        if content is None:
            raise CheckpointError(
                f"the best weights in {path} are not those that were written, and {_twin(path.name)} beside them does "
                "not hold them either, so there is no result; put one of them back from a backup, or use --fresh to "
                "set the folder aside and start again"
            )
        warnings.warn(
            f"the best weights in {path} were damaged; they are made again from {_twin(path.name)}",
            RuntimeWarning,
            stacklevel=2,
        )
        atomic.write_bytes(path, content)
        return content

    def latest(self) -> SavedRun | None:
        """Return the newest sound checkpoint, or None if there is no checkpoint.

        A damaged one is passed over with a warning, and removed together with what is newer.

        Raises:
            CheckpointError: there are checkpoints, and every one is damaged.
        """
        manifests = self._manifests()
        for manifest in manifests:
            saved = self._read(manifest)
            if isinstance(saved, SavedRun):
                if (best := saved.state["best"]["epoch"]) is not None:
                    self._best_sum = _sums(manifest)[self.best_path(best).name]
                return saved
            older = (
                "falling back to the one before it"
                if manifest != manifests[-1]
                else "and it is the oldest one"
            )
            warnings.warn(
                f"the checkpoint {manifest.with_suffix('.pt')} is damaged ({saved}); {older}",
                RuntimeWarning,
                stacklevel=2,
            )
        if manifests:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged, so the run cannot be resumed; put the folder back from "
                "a backup, or use --fresh to set it aside and start again"
            )
        return None

    def end_of_epoch(self, epoch: int) -> SavedRun | None:
        """Return the checkpoint at the end of an epoch, or None if it is gone or damaged."""
        saved = self._read(self.folder / f"epoch_{epoch:05d}.json")
        return saved if isinstance(saved, SavedRun) else None

    def discard_after(self, state: RunState) -> None:
        """Remove the checkpoints that are newer than ``state``, damaged ones, before they are made again."""
        with atomic.writing(self.folder):
            for manifest in self._manifests():
                if _order(manifest) > _order(Path(f"{checkpoint_name(state)}.json")):
                    for suffix in reversed(_PARTS):
                        manifest.with_suffix(suffix).unlink(missing_ok=True)

    def _manifests(self) -> list[Path]:
        """Return the manifests, newest first."""
        found = [path for path in self.folder.glob("epoch_*.json") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_order, reverse=True)

    def _read(self, manifest: Path) -> SavedRun | str:
        """Return a checkpoint, or what is wrong with it. Nothing in it is ever executed."""
        try:
            content = json.loads(manifest.read_bytes())
            sums: dict[str, str] = content["sha256"]
            files = {name: _read_or_nothing(self.folder / name) for name in sums}
            for name, expected in sums.items():
                if sha256(files[name]) == expected:
                    continue
                if not name.startswith("best_") or self._from_twin(name, expected) is None:
                    return f"{name} does not have the SHA-256 sum in {manifest.name}"
            if content["schema"] != _SCHEMA:
                return f"its schema is {content['schema']!r}, made by another version of mtlbalance"
            rest = torch.load(
                io.BytesIO(files[manifest.with_suffix(".pt").name]), map_location="cpu", weights_only=True
            )
            return SavedRun(safetensors.torch.load(files[manifest.with_suffix(".safetensors").name]), rest)
        except pickle.UnpicklingError as error:
            return (
                f"it holds something that is neither tensors nor plain values: {str(error).splitlines()[0]}"
            )
        except (
            OSError,
            EOFError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            return f"{type(error).__name__}: {error}"

    def _from_twin(self, name: str, expected: str) -> bytes | None:
        """Return the best weights ``name`` as the checkpoint of their epoch holds them, if it still does."""
        try:
            weights = safetensors.torch.load(_read_or_nothing(self.folder / _twin(name)))
        except (SafetensorError, ValueError, KeyError):
            return None
        averaged = {key.removeprefix(_EMA): value for key, value in weights.items() if key.startswith(_EMA)}
        content = _safetensors(averaged)
        return content if sha256(content) == expected else None

    def _prune(self) -> None:
        manifests = self._manifests()
        at_epoch_ends = [manifest for manifest in manifests if "_at_" not in manifest.name]
        needed: set[str] = set()
        for manifest in {*manifests[:_KEPT], *at_epoch_ends[:1]}:
            needed |= {manifest.with_suffix(suffix).name for suffix in _PARTS}
            needed |= {*_sums(manifest), *map(_twin, _sums(manifest))}
        # Manifests go first: one without its files would count as a damaged checkpoint.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.suffix != ".json"):
            left_by_a_kill = ".tmp-" in path.name
            if left_by_a_kill or (path.name.startswith(("epoch_", "best_")) and path.name not in needed):
                path.unlink(missing_ok=True)


def checkpoint_name(state: RunState) -> str:
    """Return the name of the checkpoint of ``state``, without a suffix."""
    if state.unfinished is None:
        return f"epoch_{state.epoch:05d}"
    return f"epoch_{state.epoch + 1:05d}_at_{state.unfinished.position:07d}"


def weights_bytes(model: nn.Module) -> bytes:
    """Return the weights as safetensors: the same bytes for the same weights, without time or place."""
    return _safetensors(model.state_dict())


def _safetensors(weights: dict[str, Tensor]) -> bytes:
    own = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    return safetensors.torch.save(own)


def _order(manifest: Path) -> tuple[int, int]:
    """Return what sorts manifests by age: the epochs that had ended, and the batches since."""
    match = _NAME.fullmatch(manifest.name)
    assert match is not None
    epoch, position = match.groups()
    return (int(epoch) + 1, 0) if position is None else (int(epoch), int(position))


def _twin(name: str) -> str:
    """Return the file of a checkpoint in which the best weights ``name`` lie as well."""
    return name.replace("best_", "epoch_", 1)


def _read_or_nothing(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # gone, or on a bad block
        return b""


def _sums(manifest: Path) -> dict[str, str]:
    try:
        return dict(json.loads(manifest.read_bytes())["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # damaged since it was written
