"""What a step does in its own way, as torch's costs small models too much: the same numbers, and nothing unseen."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mtlbalance import FixedWeightLoss
from mtlbalance.config.sections import TrainingSection
from mtlbalance.errors import NonFiniteError, TrainingError
from mtlbalance.slots import TaskSpec
from mtlbalance.training.evaluation import WeightEMA
from mtlbalance.training.memory import names_out_of_memory
from mtlbalance.training.model import MultiTaskModel
from mtlbalance.training.optimizers import clip_gradients, make_optimizer
from mtlbalance.training.step_losses import StepLosses

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # StepLosses asks the second for nothing


class Trunk(nn.Module):
    """A layer, BatchNorm, and a parameter of whole numbers that the forward pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.seen = nn.Parameter(torch.tensor([3, 10]), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += 1
        normed: Tensor = self.norm(self.layer(inputs))
        return normed


def small_model() -> MultiTaskModel:
    torch.manual_seed(0)
    return MultiTaskModel(
        Trunk(), nn.ModuleDict({"a": nn.Linear(4, 1)}), [TaskSpec("a", "regression", "mse")]
    )


def test_the_weight_average_is_that_of_torch_and_its_state_too() -> None:
    model = small_model()
    ours = WeightEMA(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    theirs.update_parameters(model)  # the copy, which ours makes at once
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        model(torch.randn(8, 3))["a"].square().sum().backward()
        optimizer.step()
        ours.update()
        theirs.update_parameters(model)
    ours.copy_the_rest(model)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"module.trunk.seen"}:
        assert torch.equal(found[name], expected[name]), name
    assert int(found["module.trunk.norm.num_batches_tracked"]) == 5
    assert found["module.trunk.seen"].tolist() == [
        8,
        15,
    ]  # whole numbers are the live model's, never averaged
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_model_that_grows_a_buffer_while_it_trains_is_noticed() -> None:
    model = small_model()
    ema = WeightEMA(model, 0.9)
    model.trunk.register_buffer("late", torch.zeros(1))
    with pytest.raises(TrainingError, match=r"buffers have changed .*trunk\.late"):
        ema.copy_the_rest(model)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_one_thread_takes_the_fused_optimizer_and_comes_to_the_same_weights(
    threads: Callable[[int], None],
) -> None:
    ended: list[list[Tensor]] = []
    for count in (1, 2):
        threads(count)
        torch.manual_seed(0)
        heads = nn.ModuleDict({"a": nn.Linear(4, 1)})
        model = MultiTaskModel(nn.Linear(3, 4), heads, [TaskSpec("a", "regression", "mse")]).double()
        inputs = torch.randn(8, 3, dtype=torch.float64)
        balancer = FixedWeightLoss(["a"])
        optimizer = make_optimizer(model, balancer, TrainingSection(lr=0.01, weight_decay=0.1))
        assert [group["fused"] for group in optimizer.param_groups] == [count == 1]
        assert [group["foreach"] for group in optimizer.param_groups] == [count != 1]
        for _ in range(20):
            optimizer.zero_grad()
            model(inputs)["a"].sub(3.0).square().mean().backward()
            optimizer.step()
        ended.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*ended, rtol=1e-10, atol=1e-12)


def test_complex_weights_do_not_take_the_fused_optimizer(threads: Callable[[int], None]) -> None:
    threads(1)
    model = small_model()
    model.heads["a"] = nn.Linear(4, 1, dtype=torch.complex64)
    [group] = make_optimizer(model, FixedWeightLoss(["a"]), TrainingSection()).param_groups
    assert (group["fused"], group["foreach"]) == (False, True)


@pytest.mark.parametrize("scale", [1e-3, 0.998, 0.9995, 1.0, 1.0005, 50.0, 0.0, math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [1.0, 0.37, math.inf])
def test_clipping_is_that_of_torch(scale: float, max_norm: float) -> None:
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((7, 5), (5,), (1,))]
    idle = nn.Parameter(torch.zeros(2))
    gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
    unit = (max_norm if math.isfinite(max_norm) else 1.0) / float(nn.utils.get_total_norm(gradients))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * unit * scale
    others = copy.deepcopy(parameters)
    for other, parameter in zip(others, parameters, strict=True):
        assert parameter.grad is not None
        other.grad = parameter.grad.clone()
    norm = clip_gradients([*parameters, idle], max_norm)
    expected = nn.utils.clip_grad_norm_(others, max_norm)
    assert torch.equal(norm.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
    for other, parameter in zip(others, parameters, strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert torch.equal(parameter.grad.nan_to_num(nan=-1.0), other.grad.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("column", "said"), [(1, "task 'b'"), (2, "balanced loss"), (3, "gradient's norm")])
def test_the_first_bad_step_is_named_however_late_it_is_read(
    device: torch.device, bad: float, column: int, said: str
) -> None:
    losses = StepLosses(["a", "b"], device)
    rows = torch.ones(130, 4)
    rows[57, column] = rows[60, 0] = bad
    trained = []

    def train() -> None:
        for step, row in enumerate(rows):
            trained.append(step)
            losses.keep(row, ["a", "b"], 4, epoch=3)
            if step in (10, 57):
                losses.means()  # the live table reads what was not checked yet

    with pytest.raises(NonFiniteError, match=rf"{said} is {bad}.* epoch 3, step 57 \(both from 0\)"):
        train()
    assert trained[-1] == (57 if device == CPU else 99)  # on CUDA every 50 steps, whoever reads in between
    with pytest.raises(NonFiniteError, match="step 57"):
        losses.check(3)  # what is bad stays bad


def test_huge_finite_losses_are_not_taken_for_infinite_ones() -> None:
    losses = StepLosses(["a", "b"], CUDA)
    for _ in range(60):
        losses.keep(torch.full((4,), 3e38), ["a", "b"], 4, epoch=0)  # their sum is infinite in float32
    losses.check(0)


def test_the_mean_over_an_epoch_counts_samples_and_leaves_absent_tasks_out() -> None:
    losses = StepLosses(["a", "b"], CPU)
    for size, value in ((4, 1.0), (2, 4.0)):
        given = {"a": torch.full((size,), value)}
        row = losses.row(given, torch.tensor(value, requires_grad=True), torch.tensor(0.5))
        assert row.tolist() == [value, 0.0, value, 0.5]
        assert not row.requires_grad
        losses.keep(row, given, size, epoch=0)
    means = losses.means()
    assert means["train_loss"] == 2.5
    assert means["train_loss_a"] == 2.0
    assert math.isnan(means["train_loss_b"])


def test_naming_what_ran_out_of_memory_can_be_entered_again_and_lets_all_else_through() -> None:
    naming = names_out_of_memory("the forward pass", "training.batch_size")
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"in the forward pass .* lower training") as raised, naming:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")
        assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    for other in (RuntimeError("shapes do not match"), KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(other)) as passed, naming:
            raise other
        assert passed.value is other
