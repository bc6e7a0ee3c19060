"""COSMOS: a weighted sum of losses with a reward for keeping to a preferred direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import real, task_names
from mtlbalance.balancers.objective import ObjectiveBalancer
from mtlbalance.balancers.preferences import preferences


class COSMOSLoss(ObjectiveBalancer):
    """Minimise Σ p_k·L_k, less a multiple of the cosine between the losses and p.

    Use it to ask for a trade-off more gently than ``PBILoss``: the reward is bounded by its factor.

    With p scaled to Σ p = 1, over the present tasks:

        f = Σ p_k·L_k − γ·(L·p)/(‖L‖·‖p‖)

    The weights are the slopes of f and may be negative; the value is f. All losses at 0 have cosine 0.

    Args:
        tasks: K >= 1 unique task names.
        preference: p, a mapping by name or a sequence, each > 0. Default: 1 each.
        penalty: γ >= 0, in units of the losses. Default 1.
        sync, process_group: see ``Balancer``.

    Absent tasks: L and p are of the present ones; one alone has weight 1.
    State and Cost: see ``ObjectiveBalancer``.

    Raises:
        InvalidArgumentError: an argument is out of range.

    Example:
        >>> import torch
        >>> balancer = COSMOSLoss(("a", "b"))
        >>> round(balancer(torch.tensor(2.0), torch.tensor(2.0)).item(), 6)
        1.0

    Source: Ruchte and Grabocka 2021. Differences: one fixed preference; theirs is drawn at every step and is an
    input of the model.
    """

    method: ClassVar[str] = "COSMOS"
    signed_weights: ClassVar[bool] = True

    preference: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        preference: Mapping[str, float] | Sequence[float] | None = None,
        penalty: float = 1.0,
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        names = task_names(tasks)
        shares = torch.tensor(preferences(preference, names))
        shares = shares / shares.sum()
        super().__init__(names, first_weights=shares.tolist(), sync=sync, process_group=process_group)
        self.penalty = real(penalty, "penalty", 0.0, math.inf)
        self.register_buffer("preference", shares, persistent=False)

    def objective(self, losses_K: Tensor, present_K: Tensor) -> Tensor:
        """Return f."""
        shares_K = self.preference * present_K
        shares_K = shares_K / shares_K.sum()
        losses_K = losses_K * present_K
        length = torch.linalg.vector_norm(losses_K)
        length = torch.where(length > 0, length, 1.0)
        lengths = length * torch.linalg.vector_norm(shares_K)
        dot = (losses_K * shares_K).sum()
        cosine = torch.where((losses_K != 0).any(), dot / lengths, 0.0)
        return dot - self.penalty * cosine
