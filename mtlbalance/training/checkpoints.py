"""Checkpoints that survive a kill at any moment: one an epoch, the last two and the best are kept.

``epoch_00012.pt`` holds the run's state and ``best_00009.safetensors`` the best weights that it refers to.
``epoch_00012.json``, written after both, lists their SHA-256 sums: it is what makes a checkpoint complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mtlbalance.errors import RunFolderError
from mtlbalance.training import atomic
from mtlbalance.training.state import RunState

_KEPT = 2


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: RunState, *, is_best: bool) -> None:
        """Write the checkpoint of ``state.epoch``, then remove those that are no longer needed."""
        with atomic.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        sums: dict[str, str] = {}
        if state.best.epoch is not None:
            best = self.best_path(state.best.epoch)
            if is_best:
                atomic.write_bytes(best, weights_bytes(state.ema.module))
            sums[best.name] = _sha256(self.best_weights(state.best.epoch))
        buffer = io.BytesIO()
        torch.save(state.state_dict(), buffer)
        name = f"epoch_{state.epoch:05d}"
        content = buffer.getvalue()
        sums[f"{name}.pt"] = _sha256(content)
        atomic.write_bytes(self.folder / f"{name}.pt", content)
        manifest = {"epoch": state.epoch, "step": state.step, "sha256": sums}
        atomic.write_text(self.folder / f"{name}.json", json.dumps(manifest, indent=2) + "\n")
        with atomic.writing(self.folder):
            self._prune()

    def best_path(self, epoch: int) -> Path:
        """Return where the weights of the best epoch lie."""
        return self.folder / f"best_{epoch:05d}.safetensors"

    def best_weights(self, epoch: int) -> bytes:
        """Return the weights of the best epoch.

        Raises:
            RunFolderError: they cannot be read.
        """
        path = self.best_path(epoch)
        try:
            return path.read_bytes()
        except OSError as error:
            raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error

    def latest(self) -> dict[str, Any] | None:
        """Return the newest sound checkpoint's content, or None if there is no checkpoint.

        A damaged one is passed over with a warning, and removed together with what is newer.

        Raises:
            RunFolderError: there are checkpoints, and every one is damaged.
        """
        manifests = self._manifests()
        for manifest in manifests:
            problem, content = self._read(manifest)
            if problem:
                warnings.warn(
                    f"the checkpoint {manifest.with_suffix('.pt')} is damaged ({problem}); "
                    "falling back to the one before it",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            return content
        if manifests:
            raise RunFolderError(
                f"every checkpoint in {self.folder} is damaged, so the run cannot be resumed; "
                "use --fresh to set this folder aside and start again"
            )
        return None

    def discard_after(self, epoch: int) -> None:
        """Remove the checkpoints of later epochs, damaged ones, before they are trained again."""
        with atomic.writing(self.folder):
            for manifest in self._manifests():
                if _epoch_of(manifest) > epoch:
                    manifest.unlink(missing_ok=True)
                    manifest.with_suffix(".pt").unlink(missing_ok=True)

    def _manifests(self) -> list[Path]:
        """Return the manifests, newest first."""
        return sorted(self.folder.glob("epoch_*.json"), key=_epoch_of, reverse=True)

    def _read(self, manifest: Path) -> tuple[str, dict[str, Any] | None]:
        try:
            sums = json.loads(manifest.read_bytes())["sha256"]
            for name, expected in sums.items():
                if _sha256((self.folder / name).read_bytes()) != expected:
                    return f"{name} does not have the SHA-256 sum in {manifest.name}", None
            return "", torch.load(manifest.with_suffix(".pt"), map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{type(error).__name__}: {error}", None

    def _prune(self) -> None:
        kept = self._manifests()[:_KEPT]
        needed = {manifest.name for manifest in kept}
        for manifest in kept:
            needed |= set(json.loads(manifest.read_bytes())["sha256"])
        for path in self.folder.iterdir():
            left_by_a_kill = ".tmp-" in path.name
            if left_by_a_kill or (path.name.startswith(("epoch_", "best_")) and path.name not in needed):
                path.unlink(missing_ok=True)


def weights_bytes(model: nn.Module) -> bytes:
    """Return the weights as safetensors: the same bytes for the same weights, without time or place."""
    weights: dict[str, Tensor] = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    return safetensors.torch.save(weights)


def _epoch_of(path: Path) -> int:
    return int(path.stem.partition("_")[2])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
