"""On a CUDA device: steps that are replayed as CUDA graphs are those of the step itself. Never run on one so far."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from compatibility import NEEDS_CUDA

from mtlbalance import GABALoss, GraphedStep
from mtlbalance.errors import CaptureError, InvalidArgumentError, RecapturedWarning

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NEEDS_CUDA),
]

TASKS = ("a", "b", "c")
OPTIONS = {"warmup_steps": 4, "update_every": 2, "steps_per_epoch": 4, "beta": 0.5, "max_weight": 1.5}
STEPS = 20


@pytest.fixture(autouse=True)
def exact_matrix_products():
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


class Training:
    """A problem on the GPU with its balancer and optimizer, stepped by ``step`` or as graphs."""

    def __init__(self, problem, balancer, *, dtype=None, lr=1e-2, clip=None):
        self.p, self.balancer, self.dtype, self.clip = problem, balancer, dtype, clip
        for module in (self.p.trunk, self.p.heads, balancer):
            module.cuda()
        groups = [
            {"params": self.p.parameters()},
            {"params": list(balancer.parameters()), "weight_decay": 0.0},
        ]
        lr = lr.cuda() if isinstance(lr, torch.Tensor) else lr
        self.optimizer = torch.optim.AdamW(groups, lr=lr, capturable=True)
        self.also = lambda total: None  # done with the loss in every step

    def step(self, inputs, targets):
        with torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype is not None):
            found = self.p.trunk(inputs)
            predictions = {task: head(found).squeeze(-1) for task, head in self.p.heads.items()}
        losses = {task: (predictions[task].float() - targets[task]).square() for task in TASKS}
        total = self.balancer(losses, shared_params=self.p.trunk, targets=targets)
        total.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.p.parameters(), self.clip)
        self.also(total)
        self.optimizer.step()
        return {"total": total, **{task: loss.mean() for task, loss in losses.items()}}

    def eagerly(self, inputs, targets):
        self.optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            return self.step(inputs, targets)

    def graphed(self):
        return GraphedStep(self.step, self.balancer, self.optimizer, eager_calls=1)


def batches(steps=STEPS, sizes=(12,)):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        size = sizes[step % len(sizes)]
        inputs = torch.randn(size, 5, generator=generator)
        yield inputs, {task: 10.0 * torch.rand(size, generator=generator) for task in TASKS}


def on_gpu(batch):
    inputs, targets = batch
    return inputs.cuda(), {task: target.cuda() for task, target in targets.items()}


def assert_alike(one, other, rtol=1e-5, atol=1e-7):
    close = {"rtol": rtol, "atol": atol, "equal_nan": True}
    for ours, theirs in zip(one.p.parameters(), other.p.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **close)
        torch.testing.assert_close(ours.grad, theirs.grad, **close)
    expected = other.balancer.state_dict()
    for name, value in one.balancer.state_dict().items():
        torch.testing.assert_close(value, expected[name], **close)
    assert one.balancer.host_counters() == other.balancer.host_counters()


def pair(make, method, problem, **options):
    return [Training(problem(TASKS), make(method, TASKS, **OPTIONS), **options) for _ in range(2)]


def follow(one, other, graphed, given=None, **tolerance):
    """Take the same batches both ways and compare after every one."""
    for batch in given or batches():
        found, expected = graphed(*batch), other.eagerly(*on_gpu(batch))
        for name, value in expected.items():
            close = {"rtol": 1e-5, "atol": 1e-6} | tolerance
            torch.testing.assert_close(found[name], value.detach(), **close)
            assert not found[name].requires_grad
        assert_alike(one, other, **tolerance)


def test_replayed_steps_are_those_of_the_step(make, method, problem):
    """Through warm-up, measured steps and those between, and the ends of epochs."""
    one, other = pair(make, method, problem)
    if one.balancer.obstacle_to_graphs():
        pytest.skip("is never captured")
    graphed = one.graphed()
    follow(one, other, graphed)
    assert len(graphed._graphs) == len({phase for phase, _ in graphed._graphs}) >= 1
    assert sum(graphed._ran.values()) < STEPS / 2


def test_with_clipping_and_bf16(make, problem):
    one, other = pair(make, "gaba", problem, dtype=torch.bfloat16, clip=1.0)
    follow(one, other, one.graphed(), rtol=1e-3, atol=1e-4)


def test_with_the_tasks_in_one_pass(problem):
    one, other = (
        Training(problem(TASKS), GABALoss(TASKS, warmup_steps=2, delivery="batched")) for _ in range(2)
    )
    follow(one, other, one.graphed())


def test_a_recurrent_trunk(make, problem):
    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(1, 6, num_layers=2, batch_first=True)

        def forward(self, inputs):
            return self.lstm(inputs[:, :, None])[0][:, -1]

    one, other = (Training(problem(TASKS, Recurrent()), make("gaba", TASKS, **OPTIONS)) for _ in range(2))
    other.p.trunk.load_state_dict(one.p.trunk.state_dict())
    follow(one, other, one.graphed(), rtol=1e-3, atol=1e-5)


def test_batches_of_two_sizes_have_graphs_of_their_own(make, problem):
    one, other = pair(make, "gaba", problem)
    graphed = one.graphed()
    follow(one, other, graphed, batches(30, sizes=(12, 12, 12, 7)))
    assert len({shapes for _, shapes in graphed._graphs}) == 2


def test_another_learning_rate_drops_the_graphs_with_a_warning(make, problem):
    one, other = pair(make, "gaba", problem)
    graphed = one.graphed()
    follow(one, other, graphed)
    for training in (one, other):
        training.optimizer.param_groups[0]["lr"] = 1e-3
    with pytest.warns(RecapturedWarning, match="a learning rate that is a tensor"):
        follow(one, other, graphed)


def test_a_learning_rate_that_is_a_tensor_is_followed(make, problem):
    one, other = pair(make, "gaba", problem, lr=torch.tensor(1e-2))
    graphed = one.graphed()
    follow(one, other, graphed)
    before = dict(graphed._graphs)
    for training in (one, other):
        training.optimizer.param_groups[0]["lr"].fill_(1e-3)
    follow(one, other, graphed)
    assert graphed._graphs.items() >= before.items()


def test_loaded_states_are_gone_on_from(make, problem):
    one, other = pair(make, "gaba", problem)
    graphed = one.graphed()
    follow(one, other, graphed)
    saved = [
        copy.deepcopy(part.state_dict()) for part in (one.p.trunk, one.p.heads, one.balancer, one.optimizer)
    ]
    follow(one, other, graphed)
    for training in (one, other):
        parts = (training.p.trunk, training.p.heads, training.balancer, training.optimizer)
        for part, state in zip(parts, saved, strict=True):
            part.load_state_dict(copy.deepcopy(state))
    assert not graphed._graphs
    follow(one, other, graphed)


def test_what_waits_for_the_device_is_an_error_and_counts_no_call(make, problem):
    one, other = pair(make, "gaba", problem)
    graphed = one.graphed()
    one.also = lambda total: total.item()
    first, second, third, *rest = batches(12)
    follow(one, other, graphed, [first, second])  # a call of each phase, as it is
    with pytest.raises(CaptureError, match="Nothing in it may wait"):
        graphed(*third)
    assert one.balancer.host_counters() == other.balancer.host_counters()
    one.also = lambda total: None
    follow(one, other, graphed, [third, *rest])


def test_wrong_calls_are_refused(make, problem):
    one, _ = pair(make, "gaba", problem)
    graphed = one.graphed()
    (batch,) = batches(1)
    one.balancer.eval()
    with pytest.raises(InvalidArgumentError, match=r"eval\(\)"):
        graphed(*batch)
    one.balancer.train()
    with (
        torch.autocast("cuda", dtype=torch.bfloat16),
        pytest.raises(InvalidArgumentError, match="inside the step"),
    ):
        graphed(*batch)
    with pytest.raises(InvalidArgumentError, match="got list"):
        graphed([1.0], {})
    with pytest.raises(InvalidArgumentError, match="called it 2 times"):
        GraphedStep(lambda *b: (one.step(*b), one.step(*b))[0], one.balancer, one.optimizer)(*batch)


def test_gradients_are_those_of_the_step_that_was_replayed(problem):
    """Two graphs, of measured calls and of others, have gradients in memory of their own."""
    training = Training(problem(TASKS), GABALoss(TASKS, warmup_steps=0, update_every=2))
    seen = []
    norm = torch.zeros(()).cuda()
    training.also = lambda _: norm.copy_(
        torch.nn.utils.get_total_norm([p.grad for p in training.p.parameters()])
    )
    graphed = training.graphed()
    for batch in batches():
        graphed(*batch)
        outside = torch.nn.utils.get_total_norm([p.grad for p in training.p.parameters()])
        seen.append((float(norm), float(outside)))
    assert all(inside == pytest.approx(outside) for inside, outside in seen)
    assert len({inside for inside, _ in seen}) == STEPS
