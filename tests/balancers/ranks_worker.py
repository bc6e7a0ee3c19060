"""One rank of ``test_ranks.py``: trains a small model under DDP and saves what it saw."""

from __future__ import annotations

import gc
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mtlbalance.balancers import ranks
from mtlbalance.errors import SharedParametersError

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_balancer

TASKS = ("a", "b", "c")
PER_RANK = 4
STEPS = 3


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
    """Name -> what is special: where gradients are read, what is synchronised, what rank 1 lacks.

    Tasks in ``missing`` are not computed on rank 1 and not in its mapping; of those in ``empty`` the loss has no
    sample there, and DDP counts on a gradient of every parameter (``find_unused_parameters=False``).
    """
    return {
        "parameters": {},
        "weighted sum": {"delivery": "weighted_sum"},
        "features": {"features": True},
        "low memory": {"delivery": "low_memory", "missing": "b"},
        "low memory, features": {"delivery": "low_memory", "features": True},
        "batched": {"delivery": "batched", "missing": "b"},
        "batched, empty": {"delivery": "batched", "empty": "b"},
        "absent on rank 1": {"missing": "b"},
        "absent, by weighted sum": {"missing": "b", "delivery": "weighted_sum"},
        "absent, features": {"missing": "b", "features": True},
        "empty on rank 1": {"empty": "b"},
        "empty, by weighted sum": {"empty": "b", "delivery": "weighted_sum"},
        "empty, features": {"empty": "b", "features": True},
        "no task on rank 1": {"empty": "abc"},
        "no task, features": {"empty": "abc", "features": True},
        "hooks": {"hooks": True},
        "sharded, features": {"features": True, "sharded": True},
        "norms": {"sync": "norms"},
        "none": {"sync": "none"},
        "non-finite on rank 1": {"bad": True},
        "update after the step": {"update": True},  # of methods that have one
        "a pair observed": {"observe": 2, "missing": "b"},
        "a pair observed, empty": {"observe": 2, "empty": "abc"},
        "one observed": {"observe": 1, "sync": "norms"},
    }


IN_THREES = {  # where an odd rank out of three may differ from one out of two
    "parameters",
    "features",
    "absent on rank 1",
    "empty on rank 1",
    "no task, features",
    "norms",
    "non-finite on rank 1",
}


def runs_in(world: int, name: str) -> bool:
    """Return whether a scenario is run by so many ranks: all of them by two, as processes take turns on few cores."""
    return world == 2 or name in IN_THREES


def train(
    method: str, scenario: dict, rank: int, world: int, steps_inputs: Tensor, steps_targets: dict
) -> dict:
    """Train on this rank's share; ``world`` 1 is the reference on the whole batch."""
    core = Model()
    distributed = dist.is_initialized()
    missing, empty = scenario.get("missing", ""), scenario.get("empty", "")
    model = core
    if distributed and scenario.get("sharded"):
        model = shard(core)
    elif distributed:
        model = DistributedDataParallel(core, find_unused_parameters=bool(missing))
    options = {key: scenario[key] for key in ("delivery", "sync") if key in scenario}
    balancer = make_balancer(method, TASKS, warmup_steps=1, beta=0.5, gamma=0.001, max_weight=1.0, **options)
    optimizer = torch.optim.SGD([*core.parameters(), *balancer.parameters()], lr=0.05, foreach=False)
    if scenario.get("hooks"):
        for parameter in core.parameters():
            parameter.register_hook(lambda gradient: 0.5 * gradient)
    weights, following = [], []
    everywhere = torch.ones(len(TASKS), dtype=torch.bool)
    tasks = tuple(task for task in TASKS if not (distributed and rank == 1 and task in missing))
    share = slice(rank * PER_RANK, (rank + 1) * PER_RANK) if distributed else slice(None)

    def batch(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        targets = {task: target[step, share] for task, target in steps_targets.items()}
        losses = per_sample(model(steps_inputs[step, share], tasks), targets)
        for task in missing + empty:
            if not distributed:  # averaged over the ranks that have it
                losses[task] = torch.cat([losses[task][:PER_RANK], losses[task][2 * PER_RANK :]])
                targets[task] = torch.cat([targets[task][:PER_RANK], targets[task][2 * PER_RANK :]])
            elif rank == 1 and task in empty:
                losses[task], targets[task] = losses[task][:0], targets[task][:0]
        return losses, targets

    for step in range(STEPS):
        optimizer.zero_grad()
        for other in range(scenario.get("observe", 0)):
            seen = (step + 1 + other) % STEPS
            balancer.observe(batch(seen)[0], shared_params=core.trunk.parameters())
        losses, targets = batch(step)
        if scenario.get("bad") and rank == 1 and step == 2:
            losses["a"] = losses["a"] * torch.inf
        shared = core.features if scenario.get("features") else core.trunk.parameters()
        sent = {"a": targets["a"]}
        balancer(losses, shared_params=shared, targets=sent).backward()
        weights.append(balancer.get_weights())
        if not scenario.get("bad") or step < 2:
            optimizer.step()
        if scenario.get("update"):
            again = per_sample(core(steps_inputs[step, share], tasks), targets)
            balancer.update(
                {
                    task: loss[:0] if distributed and rank == 1 and task in empty else loss
                    for task, loss in again.items()
                }
            )
        balancer.end_epoch()
        current = balancer.current_weights(everywhere).tolist()
        following.append(dict(zip(TASKS, current, strict=True)))
    learned = [*core.parameters(), *balancer.parameters()]
    return {
        "weights": weights,
        "following": following,  # what the state after each step gives
        "parameters": [whole(parameter.detach()).clone() for parameter in learned],
        "nonfinite": balancer.num_nonfinite,
    }


def shard(model: Model) -> nn.Module:
    """FSDP2 as it is used: each part by itself, then the whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.trunk, *model.heads.values(), model):
        fully_shard(part, mesh=mesh)
    return model


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def refusals(method: str, rank: int, steps_inputs: Tensor, steps_targets: dict) -> dict[str, str]:
    """Where sharded parameters are given, by argument -> the error that they raise, or an empty string."""
    model = shard(Model())
    share = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    targets = {task: target[0, share] for task, target in steps_targets.items()}
    said = {}
    for name, argument in (("shared_params", model.trunk.parameters()), ("model", model)):
        balancer = make_balancer(method, TASKS)
        losses = per_sample(model(steps_inputs[0, share], TASKS), targets)
        try:
            balancer(losses, targets=targets, **{name: argument}).backward()
        except SharedParametersError as error:
            said[name] = str(error)
        else:
            said[name] = ""
            assert all(parameter.grad is not None for parameter in model.parameters())
    return said


def main() -> None:
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    methods = sys.argv[5].split(",")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    inputs, targets = data(world)
    if world == 2:
        ranks.SENT_TOGETHER_BYTES = (
            1  # each task's gradients travel by themselves; three ranks send them together
        )
    results = {}
    for method in methods:
        for name, scenario in scenarios().items():
            if scenario.get("features") and make_balancer(method).needs_parameters:
                continue
            if not runs_in(world, name) or (scenario.get("update") and method != "famo"):
                continue
            if scenario.get("observe") and method not in ("sdmgrad", "modo"):
                continue
            results[f"{method}/{name}"] = train(method, scenario, rank, world, inputs, targets)
        if world == 2:
            results[f"{method}/sharded"] = refusals(method, rank, inputs, targets)
    torch.save(results, out / f"rank{rank}.pt")
    gc.collect()  # a wrapper that outlives its process group may abort the process at its end
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
