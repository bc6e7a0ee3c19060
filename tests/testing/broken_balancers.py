"""Two sound balancers by a third party, and one for every way to break a promise."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlbalance import Balancer
from mtlbalance.balancers.gradient_balancer import GradientBalancer
from mtlbalance.balancers.jacobian_balancer import Combination, JacobianBalancer
from mtlbalance.balancers.objective import ObjectiveBalancer
from mtlbalance.balancers.presence import share_of_present
from mtlbalance.errors import SharedParametersError

BROKEN: dict[type[Balancer], set[str]] = {}


def breaks(*checks: str):
    """Note which checks must fail, and no other."""

    def note(cls):
        BROKEN[cls] = set(checks)
        return cls

    return note


class InverseLoss(Balancer):
    """w_k in proportion to one over the running mean of L_k."""

    means: Tensor
    beta = 0.9

    def __init__(self, tasks) -> None:
        super().__init__(tasks)
        self.register_buffer("means", torch.full((len(self.tasks),), torch.nan))

    def weigh(self, signals) -> Tensor:
        self.move(signals, signals.present_K & signals.finite)
        return self.current_weights(signals.present_K)

    def move(self, signals, moves_K) -> None:
        moved_K = self.beta * self.means + (1 - self.beta) * signals.losses_K
        moved_K = torch.where(self.means.isnan(), signals.losses_K, moved_K)
        self.means.copy_(torch.where(moves_K, moved_K, self.means))

    def current_weights(self, present_K) -> Tensor:
        inverse_K = self.inverse()
        return share_of_present(inverse_K / inverse_K.sum(), present_K)

    def inverse(self) -> Tensor:
        typical = torch.where(self.means.isnan().all(), 1.0, self.means.nanmean())
        return 1.0 / torch.where(self.means.isnan(), typical, self.means).clamp(min=1e-12)


class InverseNorm(GradientBalancer):
    """w_k in proportion to one over the norm of g_k."""

    norms: Tensor

    def __init__(self, tasks, *, update_every: int = 1, delivery="auto") -> None:
        super().__init__(tasks, update_every=update_every, delivery=delivery)
        self.register_buffer("norms", torch.ones(len(self.tasks)))

    def weigh(self, signals) -> Tensor:
        if signals.grad_norms_K is not None:
            moves_K = signals.present_K & signals.finite & (signals.grad_norms_K > 0)
            self.norms.copy_(torch.where(moves_K, signals.grad_norms_K, self.norms))
        return self.current_weights(signals.present_K)

    def current_weights(self, present_K) -> Tensor:
        return share_of_present(1.0 / self.norms / (1.0 / self.norms).sum(), present_K)


class PlainSum(Balancer):
    """A method without task weights: the sum of the losses."""

    weight_sum = "none"

    def current_weights(self, present_K) -> Tensor:
        return present_K.to(self.applied_weights)


class SumOfGradients(JacobianBalancer):
    """Σ g_k for the trunk, as a combination of gradients."""

    def combination(self, call, layout):
        return Summed(self, layout)


class Summed(Combination):
    def __init__(self, balancer, layout):
        self.total_P = layout.zeros()
        self.balancer = balancer

    def add(self, task, gradient_P):
        self.total_P += gradient_P

    def combine(self, signals):
        return self.total_P


# ---------------------------------------------------------------------- the call
@breaks("shows_its_weights")
class OwnColumn(InverseLoss):
    def _report(self):
        return super()._report() | {"loss": self.means}


@breaks("can_be_made")
class NoBalancer(torch.nn.Module):
    def __init__(self, tasks) -> None:
        super().__init__()


@breaks(
    "value_is_what_it_minimises",
    "eval_moves_nothing",
    "no_grad_moves_nothing",
    "every_grad_is_the_weighted_sum",
    "frozen_and_unused_parameters",
    "identical_tasks_are_treated_alike",
)
class MeanOfTheSum(InverseLoss):
    def forward(self, *losses, **context):
        return super().forward(*losses, **context) / len(self.tasks)


@breaks("value_is_what_it_minimises")
class ShowsAnotherObjective(ObjectiveBalancer):
    """Minimises the sum, and shows twice the sum."""

    def __init__(self, tasks) -> None:
        super().__init__(tasks, first_weights=1.0)

    def objective(self, losses_K, present_K):
        return (losses_K * present_K).sum()

    def _train_call(self, call):
        total = super()._train_call(call)
        return total + total.detach()

    def _eval_call(self, losses, present_K):
        return 2.0 * super()._eval_call(losses, present_K)


@breaks("positions_and_names_agree", "wrong_calls_say_what_is_wrong", "weights_follow_the_tasks")
class TakesValuesInTheirOrder(InverseLoss):
    def forward(self, *losses, **context):
        full = len(losses) == 1 and isinstance(losses[0], dict) and len(losses[0]) == len(self.tasks)
        return super().forward(*(losses[0].values() if full else losses), **context)


@breaks(
    "scalars_and_samples_agree",
    "positions_and_names_agree",
    "value_is_what_it_minimises",
    "eval_moves_nothing",
    "no_grad_moves_nothing",
    "every_grad_is_the_weighted_sum",
    "frozen_and_unused_parameters",
    "identical_tasks_are_treated_alike",
)
class SumsOverSamples(InverseLoss):
    def forward(self, losses, *more, **context):
        if not isinstance(losses, dict):
            return super().forward(losses, *more, **context)
        sums = {name: 12.0 * loss if getattr(loss, "ndim", 0) == 1 else loss for name, loss in losses.items()}
        return super().forward(sums, **context)


@breaks("sample_weights_multiply_the_samples")
class IgnoresSampleWeights(InverseLoss):
    def sample_weights_of(self, losses, given, context):
        return {name: 1.0 + 0.0 * weight for name, weight in given.items()}


@breaks("wrong_calls_say_what_is_wrong")
class SwallowsTypos(InverseLoss):
    def forward(self, *losses, **context):
        if len(losses) == 1 and isinstance(losses[0], dict):
            losses = ({task: losses[0].get(task) for task in self.tasks},)
        return super().forward(*losses, **context)


@breaks("wrong_task_names_are_refused")
class MergesNames(InverseLoss):
    def __init__(self, tasks) -> None:
        super().__init__(tuple(dict.fromkeys(map(str, tasks or ()))))


@breaks("eval_moves_nothing", "no_grad_moves_nothing")
class DriftsInEval(InverseLoss):
    def _eval_call(self, losses, present_K):
        self.means.mul_(0.99)
        self.means[0] += 0.1
        return super()._eval_call(losses, present_K)


@breaks("no_grad_moves_nothing")
class CountsWithoutGradients(InverseLoss):
    def _eval_call(self, losses, present_K):
        self.calls += not torch.is_grad_enabled()
        return super()._eval_call(losses, present_K)


@breaks("global_generators_stay_untouched")
class DrawsGlobally(InverseLoss):
    draws_weights = True

    def __init__(self, tasks) -> None:
        super().__init__(tasks)
        self.register_buffer("noise", torch.zeros(len(self.tasks)))

    def move(self, signals, moves_K):
        drawn_K = torch.rand(len(self.tasks)).to(self.noise)
        self.noise.copy_(torch.where(moves_K, drawn_K, self.noise))

    def inverse(self):
        return 1.0 + 0.0 * self.noise


@breaks("a_step_waits_for_nothing", "calls_of_a_phase_are_alike")
class WaitsForTheDevice(InverseLoss):
    def weigh(self, signals):
        if signals.losses_K.sum().item() > 1e30:
            return self.current_weights(signals.present_K)
        return super().weigh(signals)


@breaks("calls_of_a_phase_are_alike")
class LearnsFasterLater(InverseLoss):
    """Has a constant that depends on the number of calls, and does not say so by phase()."""

    @property
    def beta(self):
        return 0.9 if self.calls < 5 else 0.8


# ---------------------------------------------------------------------- the weights
@breaks("any_number_of_tasks")
class NeedsTwoTasks(InverseLoss):
    def current_weights(self, present_K):
        if len(self.tasks) > 1:
            return super().current_weights(present_K)
        return self.means / (len(self.tasks) - 1)


@breaks("weights_are_alike_at_first", "the_first_call_may_be_bad")
class StartsWithTheFirstTask(InverseLoss):
    def __init__(self, tasks) -> None:
        super().__init__(tasks)
        self.applied_weights.zero_()
        self.applied_weights[0] = 1.0


@breaks("weights_follow_the_tasks", "identical_tasks_are_treated_alike", "all_losses_may_be_zero")
class PrefersTheFirst(InverseLoss):
    def inverse(self):
        place = 1.0 + torch.arange(len(self.tasks)).to(self.means)
        return torch.where(self.means.isnan().any(), 1.0, 1.0 / place)


@breaks("identical_tasks_are_treated_alike", "all_losses_may_be_zero")
class Ranks(InverseLoss):
    def inverse(self):
        known = ~self.means.isnan().any()
        return torch.where(known, 1.0 + self.means.argsort(stable=True).argsort(stable=True), 1.0)


@breaks("a_task_without_pull_breaks_nothing", "all_losses_may_be_zero")
class DividesByANorm(InverseNorm):
    def weigh(self, signals):
        if signals.grad_norms_K is not None:
            moves_K = signals.present_K & signals.finite
            self.norms.copy_(torch.where(moves_K, signals.grad_norms_K, self.norms))
        return self.current_weights(signals.present_K)


@breaks("all_losses_may_be_zero")
class DividesByALoss(InverseLoss):
    def inverse(self):
        return super().inverse() / (self.means.isnan() | (self.means > 0))


@breaks("losses_without_a_graph")
class HooksTheValue(InverseLoss):
    def _train_call(self, call):
        total = super()._train_call(call)
        total.register_hook(lambda gradient: gradient)
        return total


# ---------------------------------------------------------------------- absent tasks
@breaks("absent_tasks_have_weight_zero", "present_tasks_share_the_budget")
class WeighsTheAbsent(InverseLoss):
    def current_weights(self, present_K):
        return super().current_weights(torch.ones_like(present_K))


@breaks("present_tasks_share_the_budget")
class WastesTheBudget(InverseLoss):
    def current_weights(self, present_K):
        return super().current_weights(torch.ones_like(present_K)) * present_K


@breaks("state_of_absent_tasks_waits", "a_task_may_join_later")
class AveragesAbsence(InverseLoss):
    """Takes an absent loss for one that grows."""

    def move(self, signals, moves_K):
        super().move(signals, moves_K)
        self.means.copy_(torch.where(signals.present_K, self.means, self.means.nan_to_num(1.0) * 2.0))


# ---------------------------------------------------------------------- the state
@breaks("state_is_tensors", "state_continues_bit_for_bit", "state_inside_a_model")
class SavesText(InverseLoss):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "method"] = "inverse"


@breaks("state_continues_bit_for_bit")
class ForgetsItsMeans(InverseLoss):
    def __init__(self, tasks) -> None:
        super().__init__(tasks)
        self.register_buffer("means", self.means, persistent=False)


@breaks("state_continues_bit_for_bit", "the_first_call_may_be_bad", "calls_of_a_phase_are_alike")
class ForgetsItsSteps(InverseLoss):
    steps = 0

    def move(self, signals, moves_K):
        self.steps += 1  # lost when saved
        if self.steps % 4 == 1:
            super().move(signals, moves_K)


@breaks("a_state_of_other_tasks_is_refused")
class LoadsAnything(InverseLoss):
    def load_state_dict(self, state, **_):
        return super().load_state_dict({**state, "task_names": self.task_names}, strict=False)


@breaks("copies_go_on_alike")
class CannotBePickled(InverseLoss):
    def __init__(self, tasks) -> None:
        super().__init__(tasks)
        self.schedule = lambda step: 1.0 / step


@breaks("copies_go_on_alike")
class CopiesAreTheSame(InverseLoss):
    def __deepcopy__(self, memo):
        return self


@breaks("state_inside_a_model")
class LosesPrecision(InverseLoss):
    _apply = torch.nn.Module._apply


# ---------------------------------------------------------------------- NaN and infinity
@breaks("a_bad_loss_never_reaches_the_state")
class AveragesNaN(InverseLoss):
    def move(self, signals, moves_K):
        super().move(signals, signals.present_K)


@breaks("what_is_not_finite_is_delivered")
class HidesNaN(InverseLoss):
    def forward(self, *losses, **context):
        return torch.nan_to_num(super().forward(*losses, **context), posinf=0.0)


@breaks("bad_steps_are_counted_and_said_once")
class CountsNothing(InverseLoss):
    def _note(self, weights_K, finite):
        return super()._note(weights_K, torch.ones_like(finite))


@breaks("the_first_call_may_be_bad")
class CountsTheFirstCallAnyway(InverseLoss):
    def move(self, signals, moves_K):
        if self.calls > 0:
            super().move(signals, moves_K)


@breaks("a_bad_gradient_never_reaches_the_state")
class TrustsGradients(InverseNorm):
    def _finite(self, call, probe, measured_K):
        return call.signals.finite


# ---------------------------------------------------------------------- gradients
@breaks(
    "every_grad_is_the_weighted_sum",
    "frozen_and_unused_parameters",
    "identical_tasks_are_treated_alike",
)
class DifferentiatesItsWeights(InverseLoss):
    def _train_call(self, call):
        total = super()._train_call(call)
        return total + 0.1 * (total * total - (total * total).detach())


@breaks("backward_may_be_scaled_and_accumulated")
class IgnoresTheScaler(InverseLoss):
    def _train_call(self, call):
        total = super()._train_call(call)
        if total.requires_grad:
            total.register_hook(torch.ones_like)
        return total


@breaks("the_graph_may_be_kept")
class FreesTheGraph(InverseNorm):
    def forward(self, *losses, retain_graph=False, **context):
        return super().forward(*losses, **context)


@breaks("frozen_and_unused_parameters")
class NeedsEveryParameter(InverseNorm):
    def _shared(self, call):
        given = call.shared_params
        if isinstance(given, list) and any(isinstance(t, Tensor) and not t.requires_grad for t in given):
            raise SharedParametersError("a shared parameter is frozen")
        return super()._shared(call)


@breaks("bfloat16_models")
class NeedsFloat32(InverseLoss):
    def forward(self, *losses, **context):
        if len(losses) == 1 and isinstance(losses[0], dict):
            tensors = [loss for loss in losses[0].values() if isinstance(loss, Tensor) and loss.numel()]
            for loss in tensors:
                if loss.is_floating_point() and loss.device.type == "cpu" and loss.isfinite().all():
                    torch.linalg.eigvalsh(torch.diag(loss.detach().flatten()))
        return super().forward(*losses, **context)


@breaks("one_task_is_left_as_it_is")
class DividesByAllTasks(SumOfGradients):
    def combination(self, call, layout):
        return Averaged(self, layout)


class Averaged(Summed):
    def combine(self, signals):
        return self.total_P / len(self.balancer.tasks)


@breaks("heads_get_their_own_gradient", "a_task_may_join_later")
class DoublesHeads(SumOfGradients):
    def head_weights(self, signals):
        return 2.0 * super().head_weights(signals)


@breaks("representations_may_be_shared")
class NeedsLeaves(InverseNorm):
    def _shared(self, call):
        shared = super()._shared(call)
        if not all(tensor.is_leaf for tensor in shared):
            raise SharedParametersError("not a leaf")
        return shared


@breaks("shared_params_can_be_found")
class FindsNothing(InverseNorm):
    def forward(self, *losses, model=None, **context):
        return super().forward(*losses, **context)


@breaks("wrong_shared_params_say_what_to_pass")
class WeighsAnyway(InverseNorm):
    def _train_call(self, call):
        if call.shared_params is None and call.model is None:
            return sum(call.losses.values())
        return super()._train_call(call)
