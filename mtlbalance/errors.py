"""The exceptions of mtlbalance, and the exit code that each has on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class MtlBalanceError(Exception):
    """Base of every error that mtlbalance raises on purpose; its text is written for the user."""

    exit_code: ClassVar[int] = 2


class BalancerError(MtlBalanceError):
    """A balancer was built or called in a way that cannot give the right gradient."""


class InvalidArgumentError(BalancerError, ValueError):
    """An argument is of the wrong type, out of range, or names a task that does not exist."""


class SharedParametersError(BalancerError, ValueError):
    """``shared_params`` is missing, empty, or unrelated to a task that needs it."""


class GraphConsumedError(BalancerError, RuntimeError):
    """A balanced loss was differentiated when its gradients were delivered already, or what they need had changed."""


class CaptureError(BalancerError, RuntimeError):
    """A training step cannot be captured in a CUDA graph."""


class StateMismatchError(BalancerError, RuntimeError):
    """A saved balancer state belongs to other tasks or to another method."""


class NonFiniteWarning(UserWarning):
    """A balancer met a NaN or infinite loss or task gradient, and kept its state out of it."""


class UntrainedWeightsWarning(UserWarning):
    """A balancer's own parameters do not change: no optimizer has them."""


class RecapturedWarning(UserWarning):
    """CUDA graphs were dropped because a constant of theirs changed; they are captured anew."""


class ConfigError(MtlBalanceError):
    """A configuration cannot be used; the text lists every problem with its place."""


class PluginError(MtlBalanceError):
    """A plugin is missing, broken, or registers a name twice."""


class DataError(MtlBalanceError):
    """A data file is missing or malformed; the text names the file and the line."""


class RunFolderError(MtlBalanceError):
    """A run folder cannot be used: locked, not writable, or made from another config."""


class CheckpointError(RunFolderError):
    """Every checkpoint of a run is damaged, so that it cannot go on."""

    exit_code: ClassVar[int] = 1


class WriteError(RunFolderError):
    """The system refused a write while a run was going on, a full disk for example."""

    exit_code: ClassVar[int] = 1


class DeviceError(MtlBalanceError):
    """The device asked for does not exist on this machine."""


class TrainingError(MtlBalanceError):
    """Training itself failed, for example on a non-finite loss."""

    exit_code: ClassVar[int] = 1


class OtherRankError(TrainingError):
    """Another process of the same run failed; it says why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # of the rank that failed


class NonFiniteError(TrainingError):
    """A loss, a gradient or a weight became NaN or infinite."""


class PredictionError(MtlBalanceError):
    """A trained model failed on inputs of the right shape."""

    exit_code: ClassVar[int] = 1


class ExportError(MtlBalanceError):
    """A model cannot be exported, or what was exported does not give the model's numbers."""

    exit_code: ClassVar[int] = 1


class MissingExtraError(MtlBalanceError):
    """Something optional is asked for whose packages are not installed; the text names the extra."""


def exit_code_of(error: BaseException | None) -> int:
    """Return the exit code of the process that an error ends: 0 without one, 1 for one that is not ours."""
    return 0 if error is None else error.exit_code if isinstance(error, MtlBalanceError) else 1


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the option nearest to ``name``, or an empty string.

    >>> did_you_mean("gabba", ["gaba", "grace"])
    "; did you mean 'gaba'?"
    >>> did_you_mean("zzz", ["gaba"])
    ''
    """
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
