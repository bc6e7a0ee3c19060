"""ExcessMTL: weights that follow each task's excess risk, estimated from its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Call, Reads, Sync
from mtlbalance.balancers.checks import real
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.layout import Layout
from mtlbalance.balancers.per_parameter import PerParameter
from mtlbalance.balancers.presence import share_budget
from mtlbalance.balancers.probe import Probe
from mtlbalance.balancers.signals import Gradients, Signals


class ExcessMTLLoss(PerParameter):
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
    extra_memory: ClassVar[str] = "2·K + 2, K of them kept"
    per_parameter: ClassVar[str] = "squared_sums"

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

    def _read(self, call: Call, probe: Probe) -> Signals:
        """Move the sums and the excess risks; the signal itself is that there is something new."""
        signals = call.signals
        layout = Layout(probe.plan.shared, call.losses_K.device)
        self.size_state(layout)
        rows = {task: row for task, row in enumerate(probe.read(len(self.tasks))) if row}
        risks_K = torch.zeros(len(self.tasks), dtype=layout.dtype, device=layout.device)
        # One at a time, and again below: squares of all would be K more copies.
        for task, row in rows.items():
            squares_P = self._squares(layout, row, probe, task)
            sums_P = self.squared_sums[task] + squares_P
            risks_K[task] = torch.where(
                sums_P == 0, 0.0, squares_P.div_(sums_P.sqrt())
            ).sum()  # NaN stays NaN
        if call.ranks is not None and call.counts_K is not None and self.sync == "norms":
            risks_K = call.ranks.mean_norms(risks_K, call.counts_K)
        finite = self._finite(call, probe, risks_K)
        moves_K = signals.present_K & finite
        for task, row in rows.items():
            squares_P = self._squares(layout, row, probe, task)
            self.squared_sums[task] += torch.where(moves_K[task], squares_P, 0.0)
        risks_K = risks_K.to(self.excess_risks)
        self.excess_risks.copy_(torch.where(moves_K, risks_K, self.excess_risks))
        first_K = moves_K & self.first_risks.isnan()
        self.first_risks.copy_(torch.where(first_K, risks_K, self.first_risks))
        return signals._replace(grad_norms_K=risks_K, finite=finite)

    def _squares(self, layout: Layout, row: Gradients, probe: Probe, task: int) -> Tensor:
        gradient_P = layout.flatten(row)
        return (gradient_P if probe.scales_K is None else gradient_P.div_(probe.scales_K[task])).square_()

    def _report(self) -> dict[str, Tensor]:
        return {**super()._report(), "raw": self.excess_risks}
