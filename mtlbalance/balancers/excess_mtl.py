"""ExcessMTL: weights that follow each task's excess risk, estimated from its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Call, Reads, Sync, share_budget
from mtlbalance.balancers.checks import real
from mtlbalance.balancers.gradient_balancer import Delivery, GradientBalancer
from mtlbalance.balancers.probe import Probe
from mtlbalance.balancers.signals import Gradients, Signals
from mtlbalance.errors import SharedParametersError


class ExcessMTLLoss(GradientBalancer):
    """Give more weight to tasks that are farther from the best they could reach.

    Use it when some tasks have noisy labels: a loss that is high and stays high for noise has a small excess risk,
    and its weight does not grow.

    With g_k = ∂L_k/∂θ over ``shared_params`` θ, and squares, roots and quotients by element:

        s_k ← s_k + g_k²,  e_k = Σ g_k²/√s_k         excess risk
        w_k ← w_k·exp(η·e_k/e_k(0)),  then scaled to Σ w = 1

    with e_k(0) that of the task's first finite call.

    Args:
        tasks: K >= 1 unique task names.
        weight_lr: η > 0. Default 0.01.
        update_every: measure, and step, on every N-th call (>= 1). Default 1.
        delivery, process_group: see ``GradientBalancer``.
        sync: see ``GradientBalancer``. ``"norms"`` averages the ranks' own excess risks; each rank then keeps sums
            of its own gradients.

    Absent tasks: their sums and weights wait; the present ones share the rest.
    A zero gradient has excess risk 0; one that is zero at first has ratio 0 from then on.

    State: ``squared_sums`` (K, P) for P shared numbers, ``excess_risks``, ``first_risks``, ``task_weights``, each
    (K,), and the base's.
    Cost: K backward passes through heads and trunk, and 2·K copies of the trunk's gradients, K of them kept. No
    host sync.

    Raises:
        InvalidArgumentError: an argument is out of range, or a loss has no graph.
        SharedParametersError: ``shared_params`` is missing, empty, unrelated to a task, of another size than before,
            or holds representations: a sum over calls needs the same numbers in each.

    Example:
        >>> import torch
        >>> theta = torch.ones(2, requires_grad=True)
        >>> balancer = ExcessMTLLoss(("a", "b"), weight_lr=1.0)
        >>> for scale in (1.0, 3.0):
        ...     loss = balancer(scale * theta.sum(), theta.sum(), shared_params=[theta])
        >>> {task: round(risk, 4) for task, risk in balancer.report()["raw"].items()}  # 2*9/√10 and 2/√2
        {'a': 5.6921, 'b': 1.4142}

    Source: He et al. 2024, "Robust multi-task learning with excess risks", Algorithm 1. Differences: no 1e-7 under
    the root; implementations that scale to Σ w = K have K times the learning rate.
    """

    method: ClassVar[str] = "ExcessMTL"
    reads: ClassVar[Reads] = "jacobian"
    needs_parameters: ClassVar[bool] = True

    squared_sums: Tensor
    excess_risks: Tensor
    first_risks: Tensor
    task_weights: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        weight_lr: float = 0.01,
        update_every: int = 1,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            tasks, update_every=update_every, delivery=delivery, sync=sync, process_group=process_group
        )
        self.weight_lr = real(weight_lr, "weight_lr", 0.0, math.inf, low_open=True)
        count = len(self.tasks)
        self.register_buffer("squared_sums", torch.zeros(count, 0))
        self.register_buffer("excess_risks", torch.full((count,), math.nan))
        self.register_buffer("first_risks", torch.full((count,), math.nan))
        self.register_buffer("task_weights", torch.full((count,), 1.0 / count))

    def weigh(self, signals: Signals) -> Tensor:
        """Step the weights by what was measured, if anything, and apply them."""
        if signals.grad_norms_K is not None:
            moves_K = signals.present_K & signals.finite
            ratios_K = torch.where(self.first_risks > 0, self.excess_risks / self.first_risks, 0.0)
            powers_K = (self.weight_lr * ratios_K).masked_fill(~moves_K, -torch.inf)
            moved_K = self.task_weights * torch.exp(powers_K - powers_K.max())
            share = (self.task_weights * moves_K).sum() / (moved_K * moves_K).sum()
            self.task_weights.copy_(torch.where(moves_K, moved_K * share, self.task_weights))
        return self.current_weights(signals.present_K)

    def current_weights(self, present_K: Tensor) -> Tensor:
        """Return the weights of the present tasks, which share 1."""
        return share_budget(self.task_weights, present_K)

    def _shared(self, call: Call) -> list[Tensor]:
        shared = super()._shared(call)
        if not all(tensor.is_leaf for tensor in shared):
            raise SharedParametersError(
                f"{self.get_name()} keeps a sum for every shared parameter, so shared_params must hold parameters, "
                "not representations"
            )
        size = sum(tensor.numel() for tensor in shared)
        if self.squared_sums.shape[1] == 0:
            self.squared_sums = self.squared_sums.new_zeros(len(self.tasks), size)
        elif self.squared_sums.shape[1] != size:
            raise SharedParametersError(
                f"{self.get_name()} has sums for {self.squared_sums.shape[1]} shared numbers, but shared_params holds "
                f"{size}; pass the same parameters in every call"
            )
        return shared

    def _read(self, call: Call, probe: Probe) -> Signals:
        """Move the sums and the excess risks; the signal itself is that there is something new."""
        signals = call.signals
        squares_KP = torch.stack(
            [self._squares(row, probe.plan.shared) for row in probe.read(len(self.tasks))]
        )
        if probe.scales_K is not None:
            squares_KP = squares_KP / probe.scales_K.to(squares_KP).square()[:, None]
        sums_KP = self.squared_sums + squares_KP
        risks_K = torch.where(sums_KP == 0, 0.0, squares_KP / sums_KP.sqrt()).sum(dim=1)  # NaN stays NaN
        if call.ranks is not None and call.counts_K is not None and self.sync == "norms":
            risks_K = call.ranks.mean_norms(risks_K, call.counts_K)
        finite = self._finite(call, probe, risks_K)
        moves_K = signals.present_K & finite
        self.squared_sums.copy_(torch.where(moves_K[:, None], sums_KP, self.squared_sums))
        self.excess_risks.copy_(torch.where(moves_K, risks_K, self.excess_risks))
        first_K = moves_K & self.first_risks.isnan()
        self.first_risks.copy_(torch.where(first_K, risks_K, self.first_risks))
        return replace(signals, grad_norms_K=risks_K, finite=finite)

    def _squares(self, row: Gradients, shared: Sequence[Tensor]) -> Tensor:
        """Return the squared gradient of one task over all shared numbers; zeros where it has none."""
        device = self.squared_sums.device
        if not row:
            return torch.zeros(self.squared_sums.shape[1], device=device)
        parts = [
            torch.zeros(tensor.numel(), device=device)
            if gradient is None
            else gradient.to_dense().reshape(-1).to(device, torch.float32)
            for tensor, gradient in zip(shared, row, strict=True)
        ]
        return torch.cat(parts).square()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "squared_sums")
        if saved is not None and saved.dim() == 2 and len(saved) == len(self.tasks):
            self.squared_sums = self.squared_sums.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _report(self) -> dict[str, Tensor]:
        return {**super()._report(), "raw": self.excess_risks}
