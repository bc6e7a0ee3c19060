"""The balancer protocol: one call, named tasks, complete state. A method only says how it weighs."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mtlbalance.balancers.checks import one_of, task_names
from mtlbalance.balancers.delivery import dot, weighted_sum
from mtlbalance.balancers.losses import check_sample_weights, name_losses, no_losses, reduce_losses
from mtlbalance.balancers.presence import all_finite, everyone, is_true
from mtlbalance.balancers.ranks import Ranks, active_ranks
from mtlbalance.balancers.signals import Signals
from mtlbalance.balancers.state import TaskState
from mtlbalance.errors import NonFiniteWarning

Sync = Literal["gradients", "norms", "none"]
WeightSum = Literal["1", "K", "given", "free", "none"]
Reads = Literal["nothing", "losses", "gradient norms", "gramian", "jacobian"]
Shows = Literal["weighted sum", "objective"]
Delivers = Literal["weighted sum", "combination"]


class Call(NamedTuple):
    """One training call, digested: everything that a method's delivery needs.

    Args:
        losses: task index -> 0-d loss with its graph, for the tasks present on this rank.
        stacked_K: the same in one tensor, with its graph; None if some are absent, or they are on several devices.
        losses_K: the same, detached, 0 where absent.
        present_K: True where this rank has the task.
        signals: what loss-reading methods weigh, already averaged over ranks.
        zeros: 0-d zeros on the graphs of tasks without labels on this rank. DistributedDataParallel waits for
            a gradient of their heads, so one of zero is delivered. Empty without ranks.
        ranks: the ranks to agree with, or None.
        counts_K: how many ranks have each task, or None without ranks.
        shared_params, model, retain_graph: as given.
    """

    losses: dict[int, Tensor]
    stacked_K: Tensor | None
    losses_K: Tensor
    present_K: Tensor
    zeros: list[Tensor]
    signals: Signals
    ranks: Ranks | None
    counts_K: Tensor | None
    shared_params: Any
    model: nn.Module | None
    retain_graph: bool

    def local_weights(self, weights_K: Tensor) -> Tensor:
        """Weights for gradients that are still this rank's own, and will be averaged over all N ranks.

        A task that only n of N ranks have is scaled by N/n, so that the mean over all N is the mean over n.
        """
        if self.ranks is None or self.counts_K is None:
            return weights_K
        return weights_K * (self.ranks.size / self.counts_K.clamp(min=1.0)).to(weights_K.dtype)

    def weighted_sum(self, weights_K: Tensor) -> Tensor:
        """Return Σ w_k·L_k on this rank, differentiable, with the weights for gradients that ranks will average."""
        local_K = self.local_weights(weights_K)
        if self.stacked_K is not None and not self.zeros:
            return dot(self.stacked_K, local_K)
        return weighted_sum(self.losses, local_K, self.zeros)

    def slopes(self, weights_K: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return what Σ w_k·L_k depends on, each with its derivative: the weights, as ranks will average gradients."""
        local_K = self.local_weights(weights_K)
        if self.stacked_K is not None and not self.zeros:
            return [(self.stacked_K, local_K.to(self.stacked_K.dtype))]
        found = [(loss, local_K[index].to(loss.device, loss.dtype)) for index, loss in self.losses.items()]
        return found + [(zero, torch.ones_like(zero)) for zero in self.zeros]

    def value(self, weights_K: Tensor) -> Tensor:
        """Return Σ w_k·L_k on this rank, detached."""
        return dot(weights_K, self.losses_K)


class Balancer(TaskState, ABC):
    """Base of every balancer: from named task losses to the scalar that you call ``backward()`` on.

    Call it with the losses by name; ``.backward()`` on what it returns leaves in every ``.grad`` what the
    method prescribes. It may be scaled (GradScaler), divided (accumulation) and accumulated as usual.
    A subclass implements `weigh`; this class does names, absent tasks, sample weights, finite checks,
    ranks, state and read-outs.

    Args:
        tasks: K >= 1 unique task names.
        sync: what is averaged over ranks before it is read, see ``GradientBalancer``; ``"none"`` lets
            every rank weigh alone.
        process_group: the ranks to agree with; None: the default group.

    State: ``applied_weights`` (K,), ``nonfinite_calls``, the number of calls, and the task names; what a
    subclass adds. Tensors only; a state of other tasks is refused when loaded.
    """

    method: ClassVar[str] = "Balancer"
    reads: ClassVar[Reads] = "losses"
    # The sum of the weights of the present tasks. "none": the method has no task weights. It then reports NaN for
    # every task, and the value that it returns, in eval() too, is the plain sum of the losses.
    weight_sum: ClassVar[WeightSum] = "1"
    passes: ClassVar[str] = "1"  # backward passes through the trunk in a step that measures
    extra_memory: ClassVar[str] = "0"  # copies of the trunk's gradients that it holds beyond the plain sum's
    heads_get: ClassVar[str | None] = None  # for the table of methods, where scale_heads does not tell
    copies_to_host: ClassVar[bool] = False  # whether a training call waits for the device
    unusable: ClassVar[str] = "a loss or a task gradient was NaN or infinite"  # what keeps the state as it is
    scale_heads: bool = True  # whether the parameters of one task alone get w_k·∂L_k, or ∂L_k

    # What a method promises otherwise than most do: stated here once, read by mtlbalance.testing.
    shows: ClassVar[Shows] = (
        "weighted sum"  # what a call returns; the slopes of an "objective" are the weights
    )
    delivers: ClassVar[Delivers] = "weighted sum"  # what ``.grad`` holds; a "combination" is no Σ applied·∂L
    free_alone: ClassVar[bool] = False  # a single present task has a scale of its own, not the whole budget
    signed_weights: ClassVar[bool] = False  # a weight may be negative
    draws_weights: ClassVar[bool] = False  # weights are drawn in every call, whatever the losses
    needs_positive_losses: ClassVar[bool] = False  # a loss of 0 is outside the method's domain
    needs_parameters: ClassVar[bool] = False  # shared_params cannot be representations

    applied_weights: Tensor
    nonfinite_calls: Tensor

    def __init__(self, tasks: Sequence[str], *, sync: Sync = "gradients", process_group: Any = None) -> None:
        super().__init__()
        self.tasks = task_names(tasks)
        self.sync = one_of(sync, "sync", ("gradients", "norms", "none"))
        self.process_group = process_group
        self.calls = 0
        self._warned_nonfinite = False
        self._nonfinite_when_loaded = 0
        first = 1.0 / len(self.tasks) if self.has_task_weights else torch.nan
        self.register_buffer("applied_weights", torch.full((len(self.tasks),), first))
        self.register_buffer("nonfinite_calls", torch.zeros((), dtype=torch.int64))

    @property
    def has_task_weights(self) -> bool:
        """Whether the method weighs tasks; one that combines their gradients otherwise has no weights to report."""
        return self.weight_sum != "none"

    # ------------------------------------------------------------------ what a method says
    def weigh(self, signals: Signals) -> Tensor:
        """Move the state by one call where ``signals.finite``, and return the (K,) weights to apply, 0 where absent."""
        return self.current_weights(signals.present_K)

    @abstractmethod
    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the (K,) weights that the state gives to the present tasks, 0 elsewhere; no state change."""

    def sample_weights_of(
        self,
        losses: Mapping[str, Tensor],  # noqa: ARG002
        given: dict[str, Tensor],
        context: Mapping[str, Any],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the sample weights to use: those given in the call, unless the method has its own."""
        return given

    def end_epoch(self) -> None:
        """Tell the method that an epoch has ended; most ignore it."""

    def get_name(self) -> str:
        """Return the method's name, such as ``GABA`` or ``Fixed(0.50/0.50)``."""
        return self.method

    def obstacle_to_graphs(self) -> str:
        """Say why a training call cannot be captured in a CUDA graph, or return an empty string."""
        solves = "it copies numbers of its gradients to the host, and finds the weights there"
        return solves if self.copies_to_host else super().obstacle_to_graphs()

    # ------------------------------------------------------------------ the call
    def forward(
        self,
        *losses: Mapping[str, Tensor | None] | Tensor | None,
        shared_params: Any = None,
        model: nn.Module | None = None,
        sample_weights: Mapping[str, Tensor] | None = None,
        retain_graph: bool = False,
        **context: Any,
    ) -> Tensor:
        """Balance one batch.

        Args:
            losses: a mapping task name -> loss, or one loss a task in task order. 0-d, or per sample (B,),
                then reduced as mean(w·l). Missing, None or empty: the task is absent in this batch. Over ranks,
                give an absent task's empty loss (``loss[mask]``): its head then gets the zero gradient that
                DistributedDataParallel waits for, and a rank without any task still takes part.
            shared_params: parameters (iterable or module) or representation tensor(s) whose task gradients
                are read; ignored by methods that read none.
            model: discovers the shared parameters where ``shared_params`` is None.
            sample_weights: task name -> (B,) weights of the samples, detached; default 1.
            retain_graph: keep the graph of the losses after this call, so that terms outside the mapping, or another
                balancer, may use it; ``backward(retain_graph=True)`` is still needed to come back a second time.
            context: anything else; ignored unless the method knows it (``targets=`` for AMNL and GRACE).

        Returns:
            A 0-d tensor of value Σ applied·loss on this rank, for ``backward()`` and for logging; the plain sum of
            the losses for a method without task weights. In ``eval()`` or without gradients: the same with the
            current weights, and no state change.
        """
        ranks = active_ranks(self.process_group)
        reduced, zeros = self._reduce(losses, sample_weights, context, several_ranks=ranks is not None)
        stacked_K, losses_K, present_K = self._stack(reduced, zeros)
        if not (self.training and torch.is_grad_enabled()):
            return self._eval_call(reduced, present_K)
        call = self._digest(
            reduced, stacked_K, losses_K, present_K, zeros, ranks, shared_params, model, retain_graph
        )
        if not reduced and not bool(call.signals.present_K.any()):
            return call.weighted_sum(losses_K)  # no rank has any task: nothing moves
        return self._train_call(call)

    def _train_call(self, call: Call) -> Tensor:
        """Weigh without gradients and deliver by weighted sum."""
        return self._weighted_sum(call, self._apply_weights(call.signals))

    def _weighted_sum(self, call: Call, weights_K: Tensor) -> Tensor:
        total = call.weighted_sum(weights_K)
        if call.ranks is None and self.has_task_weights:
            return total
        return total + (self._value(call, weights_K) - total.detach())  # its gradient has N/n, its value not

    def _value(self, call: Call, weights_K: Tensor) -> Tensor:
        """Return what the balanced loss shows: Σ w_k·L_k, or the plain sum of a method without task weights."""
        return call.value(weights_K if self.has_task_weights else torch.ones_like(weights_K))

    def _eval_call(self, losses: dict[int, Tensor], present_K: Tensor) -> Tensor:
        """Return the value with the current weights; no state change."""
        if not self.has_task_weights:
            return weighted_sum(losses, torch.ones_like(self.applied_weights))
        return weighted_sum(losses, self.current_weights(present_K))

    def _apply_weights(self, signals: Signals) -> Tensor:
        """Weigh, note what was applied, and count what was not finite."""
        return self._note(self.weigh(signals), signals.finite)

    def _note(self, weights_K: Tensor, finite: Tensor) -> Tensor:
        applied = self.applied_weights
        if weights_K.requires_grad:
            weights_K = weights_K.detach()
        if weights_K.dtype != applied.dtype:
            weights_K = weights_K.to(applied.dtype)
        if self.has_task_weights:
            applied.copy_(weights_K)
        self.calls += 1
        self._count_nonfinite(finite)
        return weights_K

    def _count_nonfinite(self, finite: Tensor) -> None:
        if is_true(finite):
            return
        if finite.device.type != "cpu":
            self.nonfinite_calls += ~finite
            return
        self.nonfinite_calls += 1
        self._warn_nonfinite()

    def _reduce(
        self,
        losses: Sequence[Mapping[str, Tensor | None] | Tensor | None],
        sample_weights: Mapping[str, Tensor] | None,
        context: Mapping[str, Any],
        *,
        several_ranks: bool,
    ) -> tuple[dict[int, Tensor], list[Tensor]]:
        """Return the 0-d losses of the present tasks by index, and the zeros of absent ones that DDP waits for."""
        present, empty = name_losses(losses, self.tasks)
        training = self.training and torch.is_grad_enabled()
        zeros = [loss.sum() for loss in empty if loss.requires_grad] if training and several_ranks else []
        if not present and not zeros:
            raise no_losses(self.tasks, several_ranks=several_ranks)
        weights = self.sample_weights_of(present, check_sample_weights(sample_weights, self.tasks), context)
        reduced = reduce_losses(present, weights)
        return self._by_index(reduced), zeros

    def _by_index(self, losses: Mapping[str, Tensor]) -> dict[int, Tensor]:
        return {index: losses[task] for index, task in enumerate(self.tasks) if task in losses}

    def _stack(
        self, losses: Mapping[int, Tensor], zeros: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the losses in one tensor, if all are on one device; detached; and the presence of each task.

        The balancer follows the losses to their device.
        """
        device = next(iter([*losses.values(), *zeros])).device
        if self.applied_weights.device != device:
            with torch.inference_mode(False):  # state made under inference_mode could never be updated again
                self.to(device)
        if len(losses) == len(self.tasks):
            given = list(losses.values())
            if all(loss.device == device for loss in given):
                stacked_K = torch.stack(given)
                return stacked_K, stacked_K.detach(), everyone(len(given), device)
            losses_K = torch.stack([loss.detach().to(device) for loss in given])
            return None, losses_K, everyone(len(given), device)
        first = next(iter([*losses.values(), *zeros]))
        losses_K = torch.zeros(len(self.tasks), dtype=first.dtype, device=device)
        present_K = torch.zeros_like(losses_K, dtype=torch.bool)
        for index, loss in losses.items():
            losses_K[index] = loss.detach()
            present_K[index] = True
        return None, losses_K, present_K

    def _digest(
        self,
        losses: dict[int, Tensor],
        stacked_K: Tensor | None,
        losses_K: Tensor,
        present_K: Tensor,
        zeros: list[Tensor],
        ranks: Ranks | None,
        shared_params: Any,
        model: nn.Module | None,
        retain_graph: bool,
    ) -> Call:
        ranks = None if self.sync == "none" else ranks
        counts_K = None
        if ranks is None:
            signals = Signals(losses_K, present_K, None, all_finite(losses_K))
        else:
            mean_K, counts_K = ranks.mean_losses(losses_K, present_K)
            signals = Signals(mean_K, counts_K > 0, None, all_finite(mean_K))
        return Call(
            losses,
            stacked_K,
            losses_K,
            present_K,
            zeros,
            signals,
            ranks,
            counts_K,
            shared_params,
            model,
            retain_graph,
        )

    # ------------------------------------------------------------------ read-outs
    def report(self) -> dict[str, dict[str, float]]:
        """Return what the method shows, by task: ``applied``, and ``smoothed``, ``raw``, ``grad_norm`` if it has them.

        A read-out copies a few numbers to the host; NaN stands for what was not measured yet.
        """
        self._warn_nonfinite()
        return {
            column: dict(zip(self.tasks, values.tolist(), strict=True))
            for column, values in self._report().items()
        }

    def _report(self) -> dict[str, Tensor]:
        return {"applied": self.applied_weights}

    def get_weights(self) -> dict[str, float]:
        """Return the weights applied last, by task; before the first call, those it would start with.

        NaN for every task of a method without task weights.
        """
        return self.report()["applied"]

    @property
    def num_nonfinite(self) -> int:
        """The number of training calls with a NaN or infinite loss or task gradient; none of them moved the state."""
        self._warn_nonfinite()
        return int(self.nonfinite_calls)

    def _warn_nonfinite(self) -> None:
        if self._warned_nonfinite:
            return
        self._warned_nonfinite = int(self.nonfinite_calls) > self._nonfinite_when_loaded
        if self._warned_nonfinite:
            done = (
                "the last good weights were applied"
                if self.has_task_weights
                else "what was computed was delivered"
            )
            warnings.warn(
                f"{self.get_name()}: {self.unusable}; {done} and the state was kept "
                "(further cases are counted in num_nonfinite, without a warning)",
                NonFiniteWarning,
                stacklevel=3,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._nonfinite_when_loaded = int(self.nonfinite_calls)  # the run that counted them has warned

    def extra_repr(self) -> str:
        """Show the tasks in ``print(balancer)``."""
        return f"{self.get_name()}, tasks={self.tasks}"
