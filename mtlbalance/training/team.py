"""The processes of one run: alone, or the ranks that ``torchrun`` started."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mtlbalance.errors import DeviceError, OtherRankError, exit_code_of

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # ranks wait for rank 0 while it evaluates
_LOST = ("gloo", "nccl", "processgroup", "connection closed", "connection reset", "store")


class Team:
    """One process, which is its own first rank; base of ``RankTeam``.

    Every method that ranks take part in must be called by all of them, in the same order.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone reads and writes the run's folder."""
        return self.rank == 0

    def first(self, call: Callable[[], T]) -> T | None:
        """Let rank 0 do something while the others wait; None elsewhere.

        Raises:
            OtherRankError: on the other ranks, where it failed on rank 0.
        """
        return call()

    def shared(self, call: Callable[[], T]) -> T:
        """Let rank 0 find something out, and tell the others."""
        return call()

    def all(self, value: T) -> list[T]:
        """Return what every rank has, by rank."""
        return [value]

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest of every rank's numbers, without waiting for a device."""
        return numbers

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average a tensor over ranks, in place."""
        return tensor

    def device_name(self, name: str) -> str:
        """Return the device of this rank, from the config's."""
        return name


class RankTeam(Team):
    """The ranks of ``torch.distributed``'s default group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def first(self, call: Callable[[], T]) -> T | None:
        """See ``Team``."""
        value: T | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                value = call()
            except Exception as failed:
                error = failed
        self._raise(error)
        return value

    def shared(self, call: Callable[[], T]) -> T:
        """See ``Team``."""
        box = [self.first(call)]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def all(self, value: T) -> list[T]:
        """See ``Team``."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """See ``Team``."""
        found = torch.tensor(numbers)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return tuple(found.tolist())

    def mean_(self, tensor: Tensor) -> Tensor:
        """See ``Team``."""
        dist.all_reduce(tensor)
        return tensor.div_(self.size)

    def device_name(self, name: str) -> str:
        """Give every rank of a machine a CUDA device of its own."""
        if name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        if name == "auto":
            return "cpu"
        if name.startswith("cuda:"):
            raise DeviceError(
                f"run.device = {name!r} would put every rank on one device; use run.device=cuda"
            )
        return name

    def _raise(self, error: Exception | None) -> None:
        box = [exit_code_of(error)]
        dist.broadcast_object_list(box, src=0)
        if error is not None:
            raise error
        if box[0]:
            raise OtherRankError("rank 0 could not go on; see its message", box[0])


@contextmanager
def join_team() -> Iterator[Team]:
    """Join the ranks that ``torchrun`` started, if it did; a group that exists already is used as it is.

    Raises:
        OtherRankError: a rank was lost while others waited for it.
    """
    started = dist.is_available() and dist.is_initialized()
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR"} <= os.environ.keys()
    if not started and not launched:
        yield Team()
        return
    if not started:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield RankTeam() if dist.get_world_size() > 1 else Team()
    except RuntimeError as error:
        if any(sign in str(error).lower() for sign in _LOST):
            reason = str(error).strip().splitlines()[0]
            raise OtherRankError(
                f"another rank has failed or was lost ({reason}); see its message", 1
            ) from error
        raise
    finally:
        if not started:
            gc.collect()  # what uses the group, in cycles, goes before it: left to the end, it aborts the process
            dist.destroy_process_group()
