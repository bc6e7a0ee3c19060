"""GRACE: GABA on losses whose samples are weighted towards failure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.gaba import GABALoss
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.sample_weights import FailureWeighting


class GRACELoss(FailureWeighting, GABALoss):
    """GABA, with the biased task's samples counting more the nearer they are to failure.

    Use it where both hold: one task drowns the others, and errors near the end of life cost most.

    The biased task's loss is mean(v·l) with the weights v of ``failure_weights``; the task weights are GABA's
    on these losses. Shapes, state, absent tasks and cost are ``GABALoss``'s.

    Args:
        tasks: K >= 1 unique task names.
        biased_task: the task whose samples are weighted; its loss must be per sample, shape (B,).
        target_cap: the target y from which on a sample has weight 1, in the targets' unit (> 0), such as 125 cycles.
        max_weight: the weight at y = 0 (>= 1). Default 2.
        beta, warmup_steps, min_weight, update_every, delivery, sync, process_group: as in ``GABALoss``.

    Call: ``balancer(losses, shared_params=..., targets={biased_task: y})`` with y of shape (B,).

    Raises:
        InvalidArgumentError: an argument is out of range; targets or per-sample losses are missing in a call.
        SharedParametersError: as in ``GABALoss``.

    Example:
        >>> import torch
        >>> theta = torch.ones(1, requires_grad=True)
        >>> balancer = GRACELoss(("rul", "health"), biased_task="rul", target_cap=125.0, warmup_steps=0, beta=0.0)
        >>> losses = {"rul": theta * torch.tensor([1.0, 3.0]), "health": theta.sum()}
        >>> _ = balancer(losses, shared_params=[theta], targets={"rul": torch.tensor([0.0, 125.0])})
        >>> balancer.report()["grad_norm"]  # mean of 2 * 1 and 1 * 3
        {'rul': 2.5, 'health': 1.0}

    Source: the C-MAPSS study: GABA on (weighted MSE, cross-entropy).
    """

    method: ClassVar[str] = "GRACE"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        biased_task: str,
        target_cap: float,
        max_weight: float = 2.0,
        beta: float = 0.99,
        warmup_steps: int = 100,
        min_weight: float = 0.05,
        update_every: int = 1,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            tasks,
            beta=beta,
            warmup_steps=warmup_steps,
            min_weight=min_weight,
            update_every=update_every,
            delivery=delivery,
            sync=sync,
            process_group=process_group,
        )
        self._set_failure_weighting(biased_task, target_cap, max_weight)
