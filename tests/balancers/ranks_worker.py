"""One rank of ``test_ranks.py``: trains a small model under DDP and saves what it saw."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_balancer

TASKS = ("a", "b", "c")
PER_RANK = 4
STEPS = 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})
        self.double()

    def forward(self, inputs: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        # Kept here: what DDP returns with find_unused_parameters=True is a copy that the heads never saw.
        self.features = self.trunk(inputs)
        return {task: self.heads[task](self.features).squeeze(-1) for task in tasks}


def data(world: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(STEPS, world * PER_RANK, 5, generator=generator, dtype=torch.float64)
    targets = {
        task: 10 * torch.rand(STEPS, world * PER_RANK, generator=generator, dtype=torch.float64)
        for task in TASKS
    }
    return inputs, targets


def per_sample(predictions: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        task: 100.0 ** -TASKS.index(task) * (prediction - targets[task]).square()
        for task, prediction in predictions.items()
    }


def scenarios() -> dict[str, dict]:
    """Name -> what is special: where gradients are read, what is synchronised, which ranks lack task b."""
    return {
        "parameters": {},
        "weighted sum": {"delivery": "weighted_sum"},
        "features": {"features": True},
        "absent on rank 1": {"absent": True},
        "absent, by weighted sum": {"absent": True, "delivery": "weighted_sum"},
        "absent, features": {"absent": True, "features": True},
        "norms": {"sync": "norms"},
        "none": {"sync": "none"},
        "non-finite on rank 1": {"bad": True},
        "update after the step": {"update": True},  # of methods that have one
    }


def train(
    method: str, scenario: dict, rank: int, world: int, steps_inputs: Tensor, steps_targets: dict
) -> dict:
    """Train on this rank's share; ``world`` 1 is the reference on the whole batch."""
    core = Model()
    distributed = dist.is_initialized()
    absent_here = scenario.get("absent", False) and rank == 1
    model = (
        DistributedDataParallel(core, find_unused_parameters=absent_here or scenario.get("absent", False))
        if distributed
        else core
    )
    options = {key: scenario[key] for key in ("delivery", "sync") if key in scenario}
    balancer = make_balancer(method, TASKS, warmup_steps=1, beta=0.5, max_weight=1.0, **options)
    optimizer = torch.optim.SGD([*core.parameters(), *balancer.parameters()], lr=0.05)
    weights, following = [], []
    everywhere = torch.ones(len(TASKS), dtype=torch.bool)
    for step in range(STEPS):
        optimizer.zero_grad()
        tasks = ("a", "c") if absent_here else TASKS
        share = slice(rank * PER_RANK, (rank + 1) * PER_RANK) if distributed else slice(None)
        targets = {task: target[step, share] for task, target in steps_targets.items()}
        predictions = model(steps_inputs[step, share], tasks)
        losses = per_sample(predictions, targets)
        if scenario.get("absent") and not distributed:  # averaged over the ranks that have it
            has_b = torch.ones(len(losses["b"]), dtype=torch.bool)
            has_b[PER_RANK : 2 * PER_RANK] = False
            losses["b"] = losses["b"][has_b]
        if scenario.get("bad") and rank == 1 and step == 2:
            losses["a"] = losses["a"] * torch.inf
        shared = core.features if scenario.get("features") else core.trunk.parameters()
        sent = {"a": targets["a"]}
        balancer(losses, shared_params=shared, targets=sent).backward()
        weights.append(balancer.get_weights())
        if not scenario.get("bad") or step < 2:
            optimizer.step()
        if scenario.get("update"):
            balancer.update(per_sample(core(steps_inputs[step, share], tasks), targets))
        balancer.end_epoch()
        current = balancer.current_weights(everywhere).tolist()
        following.append(dict(zip(TASKS, current, strict=True)))
    learned = [*core.parameters(), *balancer.parameters()]
    return {
        "weights": weights,
        "following": following,  # what the state after each step gives
        "parameters": [parameter.detach().clone() for parameter in learned],
        "nonfinite": balancer.num_nonfinite,
    }


def main() -> None:
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    methods = sys.argv[5].split(",")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    inputs, targets = data(world)
    results = {}
    for method in methods:
        for name, scenario in scenarios().items():
            if scenario.get("features") and make_balancer(method).needs_parameters:
                continue
            if scenario.get("update") and method != "famo":
                continue
            results[f"{method}/{name}"] = train(method, scenario, rank, world, inputs, targets)
    torch.save(results, out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
