"""CR-MOGM: the weights of another method, averaged over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mtlbalance.balancers.aligned_mtl import AlignedMTLLoss
from mtlbalance.balancers.base import Delivers, Sync, WeightSum
from mtlbalance.balancers.cagrad import CAGradLoss
from mtlbalance.balancers.checks import one_of, real
from mtlbalance.balancers.dualproj import DualProjLoss
from mtlbalance.balancers.fairgrad import FairGradLoss
from mtlbalance.balancers.gradient_balancer import Delivery
from mtlbalance.balancers.gramian_balancer import Array, GramianBalancer, Indices, in_float32
from mtlbalance.balancers.imtl_g import IMTLGLoss
from mtlbalance.balancers.mgda import MGDALoss
from mtlbalance.balancers.nash_mtl import NashMTLLoss
from mtlbalance.balancers.pcgrad import PCGradLoss
from mtlbalance.balancers.upgrad import UPGradLoss
from mtlbalance.errors import InvalidArgumentError

SOLVERS: dict[str, type[GramianBalancer]] = {
    "mgda": MGDALoss,
    "pcgrad": PCGradLoss,
    "cagrad": CAGradLoss,
    "imtl-g": IMTLGLoss,
    "nash-mtl": NashMTLLoss,
    "fairgrad": FairGradLoss,
    "aligned-mtl": AlignedMTLLoss,
    "upgrad": UPGradLoss,
    "dualproj": DualProjLoss,
}


class CRMOGMLoss(GramianBalancer):
    """Smooth the weights of a method on the Gramian, so that one batch's noise does not decide a step.

    Use it around MGDA, CAGrad, PCGrad and the like when batches are small: weights and gradients of one batch are
    correlated, and the method need not converge to a Pareto stationary point; with slow weights it does.

    With λ̂ the weights that the method finds for this batch:

        λ ← α·λ + (1 − α)·λ̂;  the update is Σ λ_k·g_k

    Args:
        tasks: K >= 1 unique task names.
        solver: the method, by its config name with its default options (``"mgda"``, ``"pcgrad"``, ``"cagrad"``,
            ``"imtl-g"``, ``"nash-mtl"``, ``"fairgrad"``, ``"aligned-mtl"``, ``"upgrad"`` or ``"dualproj"``), or a
            balancer of the same tasks whose weights are a function of the Gramian. Default ``"mgda"``.
        alpha: α in [0, 1], the share of the old weights; 0 is the method itself. The paper lets it grow to 1 as the
            learning rate falls: set ``balancer.alpha`` as training goes. Default 0.9.
        scale_heads: whether heads are weighted too. Default: as the method has it.
        update_every, delivery, sync, process_group: see ``GradientBalancer``. Weights are averaged over measurements.
            Those of a balancer given as ``solver`` are not used.

    Weights sum to what the method's sum to. λ starts at the first λ̂, a task's at its own first: a start at 1/K would
    have a scale that the method need not have (Nash-MTL's is 1/‖g‖).
    Absent tasks: their λ wait. Of a method whose weights sum to 1, the present ones share 1 in the ratio of their λ,
    negative ones counting as 0. Zero gradients: see ``GramianBalancer``; their λ wait.

    ``report()`` has λ under ``"smoothed"`` and λ̂ under ``"raw"``; of a method without task weights (ConFIG) its
    coefficients are smoothed, and ``get_weights()`` is NaN.

    State: ``smoothed_weights`` λ (K,), NaN before the first, the method's own state with the last λ̂, and that of
    ``GramianBalancer``.
    Cost: that of the method.

    Raises:
        InvalidArgumentError: an argument is out of range, or ``solver`` is of other tasks or of another kind.

    Example:
        >>> import torch
        >>> theta = torch.ones(2, requires_grad=True)
        >>> balancer = CRMOGMLoss(("a", "b"), solver="mgda", alpha=0.75)
        >>> for factor in (1.0, 2.0):
        ...     _ = balancer(theta[0], factor * theta[1], shared_params=[theta])
        >>> balancer.get_weights()  # (0.5, 0.5), then a quarter of the way to (0.8, 0.2)
        {'a': 0.574999988079071, 'b': 0.42500001192092896}

    Source: Zhou et al. 2022, the scheme that they call CR-MOGM, around any method on the Gramian.
    """

    method: ClassVar[str] = "CR-MOGM"

    smoothed_weights: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        solver: str | GramianBalancer = "mgda",
        alpha: float = 0.9,
        scale_heads: bool | None = None,
        update_every: int = 1,
        delivery: Delivery = "auto",
        sync: Sync = "gradients",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            tasks,
            scale_heads=scale_heads,
            update_every=update_every,
            delivery=delivery,
            sync=sync,
            process_group=process_group,
        )
        self.solver = _solver(solver, self.tasks)
        self.scale_heads = self.solver.scale_heads if scale_heads is None else bool(scale_heads)
        self.weight_sum: WeightSum = self.solver.weight_sum  # type: ignore[misc]
        self.delivers: Delivers = self.solver.delivers  # type: ignore[misc]
        if not self.has_task_weights:
            self.applied_weights.fill_(torch.nan)
            self.solved_weights.copy_(self.solver.solved_weights)
        self.alpha = real(alpha, "alpha", 0.0, 1.0)
        self.register_buffer("smoothed_weights", torch.full((len(self.tasks),), torch.nan))

    def get_name(self) -> str:
        """Return the name with the method's, such as ``CR-MOGM(MGDA)``."""
        return f"{self.method}({self.solver.get_name()})"

    def solve(self, gramian: Array, losses: Array) -> Array:
        """Return the method's weights, as at the first measurement."""
        return self.solver.solve(gramian, losses)

    def solve_for(self, tasks: Indices, gramian: Array, losses: Array) -> Array:
        """Move the averages of these tasks towards the method's weights, and return them."""
        found = in_float32(self.solver.solve_for(tasks, gramian, losses))
        self.solver.solved_weights[tasks] = torch.from_numpy(found).to(self.solver.solved_weights)
        stored = self.smoothed_weights.double().cpu().numpy()
        before, budget = self._before(stored, tasks, found)
        weights = self.alpha * before + (1.0 - self.alpha) * found
        stored[tasks] = weights * budget
        self.smoothed_weights.copy_(torch.from_numpy(stored))
        return weights

    def weights_at_rest(self, tasks: Indices, losses: Array) -> Array:
        """Return the averages as they are."""
        stored = self.smoothed_weights.double().cpu().numpy()
        return self._before(stored, tasks, self.solver.weights_at_rest(tasks, losses))[0]

    def _report(self) -> dict[str, Tensor]:
        smoothed = {"smoothed": self.smoothed_weights, "raw": self.solver.solved_weights}
        return {**super()._report(), **smoothed}

    def _before(self, stored: Array, tasks: Indices, found: Array) -> tuple[Array, float]:
        """Return λ of these tasks as it was, with ``found`` for new ones, and the factor that it is stored with."""
        new = np.isnan(stored[tasks])
        before = np.where(new, found, stored[tasks])
        if self.weight_sum != "1" or new.all():
            return before, 1.0
        if new.any() or len(tasks) < len(stored):
            before = np.maximum(before, 0.0)
        total = float(before.sum())  # kept, so that the ratio to the λ of absent tasks does not change
        return (before / total, total) if total > 0 else (found, 0.0)


def _solver(given: str | GramianBalancer, tasks: Sequence[str]) -> GramianBalancer:
    if not isinstance(given, GramianBalancer):
        return SOLVERS[one_of(given, "solver", tuple(SOLVERS))](tasks)
    if not _is_function_of_gramian(given):
        raise InvalidArgumentError(
            f"solver cannot be {given.get_name()}: its weights depend on more than one batch's Gramian, and what it "
            "remembers would not move"
        )
    if given.tasks != tuple(tasks):
        raise InvalidArgumentError(
            f"solver has the tasks {given.tasks}, but this balancer has {tuple(tasks)}"
        )
    return given


def _is_function_of_gramian(given: GramianBalancer) -> bool:
    """Return whether `solve_for` is all that the method adds: others remember what it alone would not move."""
    kind = type(given)
    own_steps = (kind.weigh, kind._solve_present, kind._read)
    return own_steps == (GramianBalancer.weigh, GramianBalancer._solve_present, GramianBalancer._read)
