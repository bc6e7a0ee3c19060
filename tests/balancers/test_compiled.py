"""Every form of delivery through a trunk and heads that are compiled each for itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference_loop import OPTIONS, TASKS, Loop
from torch import Tensor, nn

from mtlbalance import GABALoss
from mtlbalance.balancers.ghost import ghost_layers

pytestmark = [  # torch's own: what it imports, and its look at ``.grad`` of the features that heads take in
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

FORMS: dict[str, dict[str, Any]] = {
    "exact": {},
    "every second step": {"update_every": 2},
    "weighted sum": {"delivery": "weighted_sum"},
    "low memory": {"delivery": "low_memory"},
    "features": {},
}


@pytest.fixture(scope="module", autouse=True)
def compiler() -> Iterator[None]:
    """torch.compile from an empty cache; buffers are kept, as K passes through one compiled module need."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


def compiled(module: nn.Module) -> Any:
    """Return a module that is compiled, or an error: with ``fullgraph`` torch never goes on uncompiled quietly."""
    return torch.compile(module, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["gaba", "pcgrad"])
def test_every_form_of_delivery_is_right_through_compiled_modules(make, problem, name, form):
    balancer, twin = (make(name, TASKS, **OPTIONS | FORMS[form]) for _ in range(2))
    trained = Loop(balancer, twin, problem(TASKS, dtype=torch.float64))
    trained.ours.trunk = compiled(trained.ours.trunk)
    for task, head in trained.ours.heads.items():
        trained.ours.heads[task] = compiled(head)
    trained.run(features=form == "features")


@pytest.mark.parametrize("which", ["trunk", "heads"])
def test_wide_linear_layers_give_the_same_gradients_compiled(which):
    """Layers whose gradients are kept as factors where they are not compiled; a compiled trunk has none to keep."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    heads = nn.ModuleDict({task: nn.Linear(512, 1) for task in TASKS})
    inputs, targets = torch.randn(8, 512), {task: torch.randn(8, 1) for task in TASKS}

    def gradients(used_trunk: Any, used_heads: Any) -> tuple[list[Tensor], dict[str, float], int]:
        features = used_trunk(inputs)
        losses = {task: (used_heads[task](features) - targets[task]).square().mean() for task in TASKS}
        kept = ghost_layers(list(trunk.parameters()), list(losses.values()))
        balancer = GABALoss(TASKS, warmup_steps=0, beta=0.0)
        trunk.zero_grad()
        balancer(losses, shared_params=trunk).backward()
        found = [p.grad.clone() for p in trunk.parameters() if p.grad is not None]
        return found, balancer.get_weights(), len(kept)

    expected, weights, plain_layers = gradients(trunk, heads)
    parts = {"trunk": trunk, "heads": heads}
    parts[which] = (
        compiled(trunk) if which == "trunk" else {task: compiled(head) for task, head in heads.items()}
    )
    found, compiled_weights, layers = gradients(parts["trunk"], parts["heads"])
    assert (plain_layers, layers) == (2, 0 if which == "trunk" else 2)
    assert compiled_weights == pytest.approx(weights, rel=1e-5)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
