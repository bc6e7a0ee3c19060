"""Complete state: tensors only, at full precision, tied to the task names it was made for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mtlbalance.errors import StateMismatchError


class FullPrecision(nn.Module):
    """A module whose buffers and parameters follow it between devices, but never change their precision.

    ``model.half()`` must not reach a running mean that moves by a hundredth a step.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: tensor.data for name, tensor in self._tensors()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, new in self._tensors():
            if new.dtype != before[name].dtype:
                new.data = before[name].to(new.device)
        return self

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.named_buffers(recurse=False), *self.named_parameters(recurse=False)]


class TaskState(FullPrecision):
    """State of K named tasks: buffers, host counters, a generator, and the names themselves.

    Host counters are Python integers, so that deciding on them never waits for a device, and are saved as
    0-d tensors; a CPU buffer in a CUDA model would break the broadcasts of DistributedDataParallel.
    """

    _counters: ClassVar[tuple[str, ...]] = ("calls",)
    _unsaved_counters: ClassVar[tuple[str, ...]] = ()  # they decide when to look or to warn, no number

    tasks: tuple[str, ...]
    calls: int
    generator: torch.Generator | None = None  # on the CPU, for methods that draw

    @property
    def task_names(self) -> Tensor:
        """The names as they are saved: UTF-8 bytes, separated by zeros."""
        return torch.tensor(list("\0".join(self.tasks).encode()), dtype=torch.uint8, device="cpu")

    def phase(self) -> tuple[Hashable, ...]:
        """Return what the next training call decides on the host's counters.

        Calls of one phase issue the same operations, constants included, and move the counters by as much, so that a
        CUDA graph of one stands for the others (`GraphedStep`). A class whose calls depend on ``calls``, or on counters
        of its own, adds here what they decide.
        """
        return ()

    def obstacle_to_graphs(self) -> str:
        """Say why what the host decides keeps a training call off CUDA graphs, or return an empty string."""
        if self.generator is not None:
            return "it draws its weights on the host"
        counts, says = (
            next(cls for cls in type(self).__mro__ if name in vars(cls)) for name in ("_counters", "phase")
        )
        if not issubclass(says, counts):
            return f"{counts.__name__} has counters of its own, and no phase() that says what they decide"
        return ""

    def host_counters(self) -> dict[str, int]:
        """Return the counters that are kept on the host, by name."""
        return {name: getattr(self, name) for name in (*self._counters, *self._unsaved_counters)}

    def counters_since(self, before: Mapping[str, int]) -> dict[str, int]:
        """Return how far each counter has moved since ``host_counters`` returned ``before``."""
        return {name: value - before[name] for name, value in self.host_counters().items()}

    def move_counters(self, by: Mapping[str, int]) -> None:
        """Move counters by what ``counters_since`` returned for another call of the same phase."""
        for name, change in by.items():
            setattr(self, name, getattr(self, name) + change)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "task_names"] = self.task_names
        for name in self._counters:
            destination[prefix + name] = torch.tensor(getattr(self, name), device="cpu")
        if self.generator is not None:
            destination[prefix + "generator"] = self.generator.get_state()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        extra = ["task_names", *self._counters, *(["generator"] if self.generator is not None else [])]
        saved = {name: state_dict[prefix + name] for name in extra if prefix + name in state_dict}
        if "task_names" in saved and (names := _decode(saved["task_names"])) != self.tasks:
            raise StateMismatchError(
                f"this state was saved for the tasks {names}, but {type(self).__name__} has {self.tasks}"
            )
        for name in self._counters:
            if name in saved:
                setattr(self, name, int(saved[name]))
        if self.generator is not None and "generator" in saved:
            self.generator.set_state(saved["generator"].cpu())
        own = {prefix + name for name in extra}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(rest, prefix, *args)
        missing_keys: list[str] = args[2]
        missing_keys.extend(prefix + name for name in extra if name not in saved)


def _decode(names: Sequence[int] | Tensor) -> tuple[str, ...]:
    return tuple(bytes(torch.as_tensor(names).tolist()).decode().split("\0"))
