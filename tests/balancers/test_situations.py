"""Every method in every loop: what training leaves in the parameters, against a plain loop in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from reference_loop import OPTIONS, STEPS, TASKS, Loop
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtlbalance import GABALoss
from mtlbalance.errors import SharedParametersError

situation = pytest.mark.situation


@pytest.fixture
def loop(make, method, problem) -> Callable[..., Loop]:
    def build(
        trunk: nn.Module | None = None, prepare: Callable = lambda p: None, **arguments: object
    ) -> Loop:
        p = problem(TASKS, trunk, dtype=torch.float64)
        prepare(p)
        options = {name: arguments.pop(name) for name in ("scale_heads",) if name in arguments}
        balancer, twin = (make(method, TASKS, **OPTIONS | options) for _ in range(2))
        return Loop(balancer, twin, p, **arguments)

    return build


@pytest.fixture(scope="module")
def compiler() -> Iterator[None]:
    """torch.compile from an empty cache; buffers are kept, as K passes through one compiled module need."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


# ------------------------------------------------------------------ the loop
@situation("AdamW")
def test_a_plain_loop(loop):
    loop().run()


@situation("features")
def test_features_where_trunk_meets_heads(loop, refuses):
    trained = loop()
    if trained.balancer.needs_parameters:
        with pytest.raises(SharedParametersError, match="not representations"):
            trained.run(features=True)
        refuses("its state is a number for every shared parameter; pass parameters as `shared_params`")
        return
    trained.run(features=True)


@situation("gradient clipping")
def test_gradient_clipping(loop):
    loop(max_norm=1e-3).run()


@situation("gradient accumulation")
def test_gradient_accumulation(loop):
    loop(parts=2).run()


@situation("fused AdamW")
def test_fused_adamw(loop):
    loop(fused=True).run()


# ------------------------------------------------------------------ the model
@situation("frozen and unused")
def test_frozen_and_unused_parameters(loop):
    trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
    trunk[0].weight.requires_grad_(False)
    trunk[1].unused = nn.Parameter(torch.ones(3))
    loop(trunk).run()


@situation("batch norm")
def test_batch_statistics_are_updated_once_a_step(loop):
    trained = loop(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6)))
    trained.run()
    assert trained.ours.trunk[1].num_batches_tracked.item() == STEPS


class RecurrentTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 6, num_layers=2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.lstm(inputs[:, :, None])[0][:, -1]


@situation("recurrent trunk")
def test_a_recurrent_trunk(loop):
    loop(RecurrentTrunk()).run()


class CheckpointedTrunk(nn.Module):
    def __init__(self, trunk: nn.Sequential) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, inputs: Tensor) -> Tensor:
        return self.trunk[2:](checkpoint(self.trunk[:2], inputs, use_reentrant=False))


@situation("checkpointing")
def test_activation_checkpointing(loop):
    trained = loop()
    trained.ours.trunk = CheckpointedTrunk(trained.ours.trunk)
    trained.run()


@situation("heads share parameters")
def test_parameters_that_two_of_three_heads_share(loop, footnote):
    def prepare(p):
        p.heads["c"] = p.heads["b"]

    trained = loop(prepare=prepare)
    if trained.balancer.delivers == "weighted sum":
        trained.run()
        return
    # A combination reaches what it is told of, and nobody else could say what the rest should get.
    if trained.balancer.reads == "jacobian":
        with pytest.raises(SharedParametersError, match="must hold all that two tasks share"):
            trained.run()
        trained = loop(prepare=prepare)
    footnote("pass what two heads share in `shared_params`, too")
    trained.run(shared=lambda p: [*p.trunk.parameters(), *p.heads["b"].parameters()])


@situation("parameter hooks")
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_run_once_on_what_is_delivered(loop, kind):
    """A hook sees what an ordinary backward pass would have handed it, once."""
    trained = loop()
    seen = []

    def halve(gradient):
        seen.append(1)
        return 0.5 * gradient

    def halve_in_place(leaf):
        seen.append(1)
        leaf.grad.mul_(0.5)

    for p in (trained.ours, trained.plain):
        hooked = (p.trunk[0].weight, p.heads["a"].weight)
        if p is trained.plain:
            trained.before_step = lambda leaves=hooked: [leaf.grad.mul_(0.5) for leaf in leaves]
            continue
        for leaf in hooked:
            getattr(leaf, kind)(halve if kind == "register_hook" else halve_in_place)
    trained.run()
    assert len(seen) == 2 * STEPS


@situation("compiled trunk")
def test_a_compiled_trunk(loop, compiler):
    trained = loop()
    trained.ours.trunk = torch.compile(trained.ours.trunk, backend="aot_eager")
    trained.run()


class Whole(nn.Module):
    """Trunk and heads in one forward pass."""

    def __init__(self, trunk: nn.Module, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, heads

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        features = self.trunk(inputs)
        return tuple(head(features).squeeze(-1) for head in self.heads.values())


@situation("compiled model")
def test_a_model_compiled_as_a_whole(loop, compiler, footnote, refuses):
    """Heads cannot be told apart in it, so a method that leaves heads alone says what to do."""
    trained = loop()
    p, balancer = trained.ours, trained.balancer
    model = torch.compile(Whole(p.trunk, p.heads), backend="aot_eager")

    def losses():
        predictions = model(p.inputs)
        return {
            task: 100.0**-k * (predictions[k] - p.targets[task]).square() for k, task in enumerate(p.tasks)
        }

    if not balancer.scale_heads:
        advice = f"compile the trunk and the heads each for itself, or {balancer.weighted_heads}"
        with pytest.raises(SharedParametersError, match=advice):
            balancer(losses(), shared_params=p.trunk, targets=p.targets)
        trained = loop(scale_heads=True)
        why = "a model compiled as a whole does not show which parameters are a head's"
        if not trained.balancer.scale_heads:
            refuses(f"{why}; {balancer.weighted_heads}")
            return
        p = trained.ours
        model = torch.compile(Whole(p.trunk, p.heads), backend="aot_eager")
        footnote(f"with `scale_heads=True`: {why}")
    trained.run(losses)


def test_compiled_modules_that_give_up_their_buffers_are_refused_with_the_way_out(problem):
    """As those do whose first backward pass was a plain one; features of such a trunk are passed once, and work."""
    p = problem(TASKS)
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=True):
        trunk = torch.compile(p.trunk, backend="aot_eager")
        trunk(p.inputs).sum().backward()
        balancer = GABALoss(TASKS, warmup_steps=0)
        with pytest.raises(SharedParametersError, match=r"donated_buffer = False.*pass its features"):
            balancer(p.per_sample(trunk(p.inputs)), shared_params=p.trunk)
        assert balancer.calls == 0
        features = trunk(p.inputs)
        balancer(p.per_sample(features), shared_params=features).backward()
    torch._dynamo.reset()
    assert all(parameter.grad is not None for parameter in p.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_trunk_compiled_by_inductor(make, problem, compiler):
    for method in ("gaba", "mgda"):
        balancer, twin = (make(method, TASKS, **OPTIONS) for _ in range(2))
        trained = Loop(balancer, twin, problem(TASKS, dtype=torch.float64))
        trained.ours.trunk = torch.compile(trained.ours.trunk)
        trained.run()
