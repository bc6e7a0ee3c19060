"""What the trainer relies on of a backbone plugin."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtlbalance.plugins.references import build_plugin
from mtlbalance.plugins.registrations import BackboneRegistration
from mtlbalance.slots import InputSpec, TaskSpec
from mtlbalance.testing.checks import Checks, Report
from mtlbalance.testing.expectations import expect, expect_close, expect_equal
from mtlbalance.testing.generators import expect_no_draw, kept_generators

if TYPE_CHECKING:
    from mtlbalance.training.model import MultiTaskModel

TASKS = (
    TaskSpec("amount", "regression", "mse"),
    TaskSpec("place", "regression", "mse", outputs=2),
    TaskSpec("kind", "classification", "cross_entropy", outputs=3),
)
SHAPES = ((8,), (16, 8), (3, 32, 32))  # tried in this order where none is given
BATCH = 7


class BackboneCase:
    """A registered backbone, its options, and the inputs and tasks to build it for.

    Args:
        registration: what the plugin registers.
        options: by name, as in a config's ``[backbone]``.
        inputs: default: the first of (8,), (16, 8) and (3, 32, 32) that it can be built and run for.
        tasks: default: a regression, a regression of width 2 and a classification of 3 classes.
    """

    def __init__(
        self,
        registration: BackboneRegistration,
        options: Mapping[str, Any] | None = None,
        inputs: InputSpec | None = None,
        tasks: Sequence[TaskSpec] = TASKS,
    ) -> None:
        self.registration = registration
        self.tasks = tuple(tasks)
        self._options = dict(options or {})
        self._given = inputs

    @cached_property
    def inputs(self) -> InputSpec:
        """The description of the inputs."""
        if self._given is not None:
            return self._given
        first_error: Exception | None = None
        for shape in SHAPES:
            try:
                self._build(InputSpec(shape), 0).eval()(torch.zeros(2, *shape))
                return InputSpec(shape)
            except Exception as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def model(self, seed: int = 0) -> MultiTaskModel:
        """Build trunk and heads as the trainer does, from a seed."""
        return self._build(self.inputs, seed)

    def _build(self, inputs: InputSpec, seed: int) -> MultiTaskModel:
        from mtlbalance.training.model import build_model

        config = self.registration.config(**self._options)
        with kept_generators(seed):
            backbone: nn.Module = build_plugin(self.registration, config, inputs, self.tasks)
            return build_model(backbone, self.tasks, name=self.registration.name)

    def batch(self, size: int = BATCH) -> Tensor:
        """Return random inputs, the same for the same size."""
        return torch.randn(size, *self.inputs.shape, generator=torch.Generator().manual_seed(3))


CHECKS: Checks[BackboneCase] = Checks()


@CHECKS.add(first=True)
def can_be_built(case: BackboneCase) -> None:
    """build(config, inputs, tasks) gives a trunk, and heads or feature_size; no parameter lies outside them."""
    case.model()


@CHECKS.add()
def features_are_rows(case: BackboneCase) -> None:
    """The trunk turns a batch of inputs into features of shape (B, width)."""
    features = case.model().trunk(case.batch())
    expect(isinstance(features, Tensor), f"trunk(inputs): expected a tensor; found {type(features).__name__}")
    rows = features.dim() == 2 and len(features) == BATCH and features.is_floating_point()
    expect(
        rows,
        f"trunk(inputs): expected shape ({BATCH}, width); found {tuple(features.shape)}, {features.dtype}",
    )


@CHECKS.add()
def heads_fit_their_tasks(case: BackboneCase) -> None:
    """A regression of width 1 predicts (B,), anything else (B, outputs)."""
    predictions = case.model()(case.batch())
    for task in case.tasks:
        scalar = task.kind == "regression" and task.outputs == 1
        expected = (BATCH,) if scalar else (BATCH, task.outputs)
        expect_equal(
            tuple(predictions[task.name].shape), expected, f"the shape of the predictions of {task.name!r}"
        )


@CHECKS.add()
def samples_are_apart_in_eval(case: BackboneCase) -> None:
    """In eval() any batch size works, one included, and a sample's prediction does not depend on its batch."""
    model = case.model().eval()
    inputs = case.batch()
    together = model(inputs)
    for index in (0, BATCH - 1):
        for name, alone in model(inputs[index : index + 1]).items():
            what = f"the prediction of {name!r} for a sample alone, against in a batch of {BATCH}"
            expect_close(alone[0], together[name][index], what, rtol=1e-4, atol=1e-5)


@CHECKS.add()
def every_task_trains_the_whole_trunk(case: BackboneCase) -> None:
    """Every trunk parameter that is trained gets a gradient from every task: what one task uses alone is its head's."""
    model = case.model()
    shared = {name: p for name, p in model.trunk.named_parameters() if p.requires_grad}
    for task in case.tasks:
        prediction = model(case.batch())[task.name]
        weights = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(4))
        loss = (prediction * weights).sum()
        expect(
            loss.requires_grad, f"the prediction of {task.name!r}: expected one that depends on parameters"
        )
        gradients = torch.autograd.grad(loss, list(shared.values()), allow_unused=True)
        without = [name for name, gradient in zip(shared, gradients, strict=True) if gradient is None]
        expect(
            not without, f"trunk parameters without a gradient from {task.name!r}: {', '.join(without[:4])}"
        )
        if shared:
            pulls = any(bool((gradient != 0).any()) for gradient in gradients if gradient is not None)
            expect(pulls, f"the gradient of {task.name!r} on the trunk: expected one; it is zero everywhere")


def has_several_tasks(case: BackboneCase) -> str:
    """Say why tasks cannot be told apart."""
    return "" if len(case.tasks) > 1 else "there is one task"


@CHECKS.add(applies=has_several_tasks)
def heads_belong_to_one_task(case: BackboneCase) -> None:
    """No task's prediction depends on the head of another task."""
    model = case.model()
    for task in case.tasks:
        loss = model(case.batch())[task.name].sum()
        others = [
            p
            for name, head in model.heads.items()
            if name != task.name
            for p in head.parameters()
            if p.requires_grad
        ]
        reached = torch.autograd.grad(loss, others, allow_unused=True)
        expect(
            all(gradient is None for gradient in reached), f"{task.name!r} reaches the head of another task"
        )


@CHECKS.add()
def seeds_reproduce(case: BackboneCase) -> None:
    """The same seed gives the same weights to the last bit; another seed gives others."""
    one, again, other = case.model(0).state_dict(), case.model(0).state_dict(), case.model(1).state_dict()
    for name, values in one.items():
        expect_equal(again[name], values, f"{name}, built again from the same seed")
    differs = any(not torch.equal(values, other[name]) for name, values in one.items())
    expect(differs, "the weights from another seed: expected others; they are the same")


@CHECKS.add()
def eval_is_steady(case: BackboneCase) -> None:
    """In eval() the same inputs give the same predictions, nothing is drawn, and no buffer moves."""
    model = case.model().eval()
    before = copy.deepcopy(model.state_dict())
    first = model(case.batch())
    with expect_no_draw("a call in eval()"):
        second = model(case.batch())
    for name, values in first.items():
        expect_equal(
            second[name], values, f"the second prediction of {name!r} for the same inputs, in eval()"
        )
    for name, values in model.state_dict().items():
        expect_equal(values, before[name], f"{name} after two calls in eval()")


@CHECKS.add()
def outputs_are_finite(case: BackboneCase) -> None:
    """Untrained, in train() and in eval(), every prediction of inputs of size 1 is finite, and so is its gradient."""
    model = case.model()
    for training in (True, False):
        model.train(training)
        total = torch.zeros(())
        for name, values in model(case.batch()).items():
            expect(
                bool(values.isfinite().all()), f"the predictions of {name!r}, training={training}: not finite"
            )
            total = total + values.square().sum()
        parameters = [p for p in model.parameters() if p.requires_grad]
        for gradient in torch.autograd.grad(total, parameters, allow_unused=True):
            finite = gradient is None or bool(gradient.isfinite().all())
            expect(finite, f"a gradient, training={training}: expected finite numbers")


@CHECKS.add()
def state_is_complete(case: BackboneCase) -> None:
    """A state_dict loaded into a model from another seed, and a deep copy, predict the same."""
    model = case.model(0)
    model(case.batch())  # moves running statistics, if there are any
    loaded = case.model(1)
    loaded.load_state_dict(model.state_dict())
    expected = model.eval()(case.batch())
    for how, twin in {"state_dict": loaded, "copy.deepcopy": copy.deepcopy(model)}.items():
        for name, values in twin.eval()(case.batch()).items():
            expect_equal(values, expected[name], f"the predictions of {name!r} by way of {how}")


@CHECKS.add()
def follows_the_device(case: BackboneCase) -> None:
    """On another device everything lies there: no tensor is made on the CPU in forward, none is kept out of buffers."""
    model = case.model().eval().to("meta")
    try:
        predictions = model(torch.zeros(BATCH, *case.inputs.shape, device="meta"))
    except NotImplementedError:  # an operator that has no shape rule: nothing can be said
        return
    for name, values in predictions.items():
        expect(
            values.device.type == "meta", f"the predictions of {name!r} on device meta: found {values.device}"
        )


BACKBONE_CHECKS = CHECKS


def check_backbone(
    registration: BackboneRegistration,
    options: Mapping[str, Any] | None = None,
    *,
    inputs: InputSpec | None = None,
    tasks: Sequence[TaskSpec] = TASKS,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> Report:
    """Hold a backbone plugin to what the trainer relies on.

    Args:
        registration: one of those that your ``register_backbones`` returns.
        options: by name, as in a config's ``[backbone]``; small sizes make a fast test.
        inputs: what it is built for; default: the first of the shapes (8,), (16, 8) and (3, 32, 32) that it takes.
        tasks: what it predicts; default: a regression, one of width 2, and a classification of 3 classes.
        only: the names of the checks to run; default: all.
        skip: the names of checks to leave out.

    Returns:
        The report: the outcome of each check.

    Raises:
        ConformanceError: promises are broken; the text lists what was expected and what was found.

    Example:
        >>> from mtlbalance.plugins import load_plugins
        >>> mlp = load_plugins(entry_points=False).get("backbone", "mlp")
        >>> check_backbone(mlp, {"hidden_sizes": (4,)}).broken
        ()
    """
    case = BackboneCase(registration, options, inputs, tasks)
    outcomes = tuple(BACKBONE_CHECKS.examine(case, only=only, skip=skip))
    return Report(registration.name, outcomes).raise_if_broken()
