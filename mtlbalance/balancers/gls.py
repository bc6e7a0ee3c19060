"""GLS: the geometric mean of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlbalance.balancers.base import Sync
from mtlbalance.balancers.checks import task_names
from mtlbalance.balancers.objective import ObjectiveBalancer


class GLSLoss(ObjectiveBalancer):
    """Minimise the geometric mean of the losses, so that each is improved in proportion to its size.

    Use it when losses differ in scale and are all positive; a common factor in one loss changes no direction.

    Over the P present tasks:

        f = (Π L_k)^{1/P},  w_k = f/(P·L_k)

    computed in logarithms, so that no product over- or underflows. The weights reported are these slopes, which
    are what is applied.

    Args:
        tasks: K >= 1 unique task names.
        sync, process_group: see ``Balancer``.

    Absent tasks: the mean is over the present ones; one alone has weight 1.
    Losses that are not positive have no logarithm: the call counts in ``num_nonfinite``, with the last good
    weights and a warning.
    State and Cost: see ``ObjectiveBalancer``.

    Example:
        >>> import torch
        >>> balancer = GLSLoss(("a", "b"))
        >>> balancer(torch.tensor(4.0), torch.tensor(1.0)).item()
        2.0
        >>> balancer.get_weights()
        {'a': 0.25, 'b': 1.0}

    Source: Chennupati et al. 2019, "MultiNet++". Differences: no focused tasks (their product with some losses
    counted twice).
    """

    method: ClassVar[str] = "GLS"
    needs_positive_losses: ClassVar[bool] = True

    def __init__(self, tasks: Sequence[str], *, sync: Sync = "gradients", process_group: Any = None) -> None:
        names = task_names(tasks)
        super().__init__(names, first_weights=1.0 / len(names), sync=sync, process_group=process_group)

    def objective(self, losses_K: Tensor, present_K: Tensor) -> Tensor:
        """Return the geometric mean; the logarithm of an absent task's 1 is 0."""
        return torch.exp(losses_K.log().sum() / present_K.sum())
