"""How exact the methods are: N ranks against one process, and against torchjd where it has the same rule.

python benchmarks/agreement.py

Prints, for each registered method, the worst relative error in float32 of the delivered gradients of two and three
ranks to those of one process on the whole batch; and, for random Jacobians of K = 2 to 10 tasks in float64, the worst
relative error to torchjd's combination
(MGDA: of the length that it minimises; PCGrad and GradVac, whose order is drawn: K = 2).
Needs torchjd (of the development dependencies), and for CAGrad and Nash-MTL its extra `full`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from measuring import markdown_header, markdown_row
from torch import Tensor, nn
from torchjd import aggregation
from torchjd.linalg import QuadprogProjector

from mtlbalance.balancers.base import Balancer
from mtlbalance.plugins.manager import load_plugins
from mtlbalance.plugins.references import resolve_build
from mtlbalance.slots import TaskSpec

TASKS = ("a", "b", "c")
PER_RANK = 8
STEPS = 3
REGISTRY = load_plugins(entry_points=False)


def make(method: str, tasks: tuple[str, ...] = TASKS) -> Balancer:
    """Build a registered balancer with its defaults, measuring from the first call."""
    registration = REGISTRY.get("balancer", method)
    fields = registration.config.model_fields
    wanted = {"biased_task": tasks[0], "target_cap": 10.0, "warmup_steps": 0, "beta": 0.5}
    kept = {
        key: value for key, value in wanted.items() if key in fields and (key != "beta" or method == "gaba")
    }
    specs = [TaskSpec(task, "regression", "mse") for task in tasks]
    balancer = resolve_build(registration)(registration.config(**kept), specs)
    assert isinstance(balancer, Balancer)
    return balancer


# ------------------------------------------------------------------ ranks
def gradients(method: str, rank: int | None, world: int) -> Tensor:
    """Return all delivered gradients of a few calls, of one rank's share under DDP or of the whole batch."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
    heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS})
    core = Losses(trunk, heads)
    model = core if rank is None else nn.parallel.DistributedDataParallel(core)
    share = slice(None) if rank is None else slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    balancer = make(method)
    found = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        inputs = torch.randn(world * PER_RANK, 6, generator=generator)
        targets = 10.0 * torch.rand(world * PER_RANK, len(TASKS), generator=generator)
        core.zero_grad()
        losses = model(inputs[share], targets[share])
        balancer(losses, shared_params=trunk.parameters(), targets={"a": targets[share, 0]}).backward()
        found += [parameter.grad.flatten() for parameter in core.parameters() if parameter.grad is not None]
    return torch.cat(found)


class Losses(nn.Module):
    """A trunk with heads that returns the tasks' per-sample losses; the second task's are a hundredth, and so on."""

    def __init__(self, trunk: nn.Module, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, heads

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the per-sample losses by task."""
        features = self.trunk(inputs)
        return {
            task: 100.0**-k * (self.heads[task](features).squeeze(-1) - targets[:, k]).square()
            for k, task in enumerate(TASKS)
        }


def rank_main(rank: int, world: int, folder: Path) -> None:
    """Deliver every method's gradients as one of several ranks and save them."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    found = {method: gradients(method, rank, world) for method in REGISTRY.names("balancer")}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def rank_errors(world: int) -> dict[str, float]:
    """Return by method the worst relative error over ranks, in the norm over all gradients."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank"]
        processes = [subprocess.Popen([*command, str(rank), str(world), folder]) for rank in range(world)]
        if any(process.wait(timeout=600) for process in processes):
            raise RuntimeError("a rank failed")
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]
    errors = {}
    for method in REGISTRY.names("balancer"):
        exact = gradients(method, None, world)
        errors[method] = max(((rank[method] - exact).norm() / exact.norm()).item() for rank in ranks)
    return errors


# ------------------------------------------------------------------ torchjd
def peers() -> dict[str, Callable[[int], aggregation.Aggregator]]:
    """Return torchjd's aggregator of the same rule for K tasks, its Gramian regularisation turned down."""

    def projector() -> QuadprogProjector:
        return QuadprogProjector(norm_eps=0.0, reg_eps=1e-10)

    solved: dict[str, Callable[[int], aggregation.Aggregator]] = {}
    if find_spec("cvxpy") and find_spec("clarabel"):
        solved["cagrad"] = lambda _: aggregation.CAGrad(c=0.5, norm_eps=0.0)
    return solved | {
        "imtl-g": lambda _: aggregation.IMTLG(),
        "aligned-mtl": lambda _: aggregation.AlignedMTL(),
        "upgrad": lambda _: aggregation.UPGrad(projector=projector()),
        "dualproj": lambda _: aggregation.DualProj(projector=projector()),
        "pcgrad": lambda _: aggregation.PCGrad(),
        "gradvac": lambda _: aggregation.GradVac(),
        "mgda": lambda _: aggregation.MGDA(max_iters=20_000, epsilon=1e-9),
        "config": lambda _: aggregation.ConFIG(),
        "trimmed-mean": lambda count: aggregation.TrimmedMean(trim_number=count // 4),
    }


def combination(method: str, jacobian: np.ndarray) -> np.ndarray:
    """Return what a method delivers for losses with exactly these gradients."""
    balancer = make(method, tuple(f"t{k}" for k in range(len(jacobian))))
    theta = torch.zeros(jacobian.shape[1], dtype=torch.float64, requires_grad=True)
    balancer(*(torch.from_numpy(row) @ theta for row in jacobian), shared_params=[theta]).backward()
    assert theta.grad is not None
    return theta.grad.numpy()


def torchjd_error(method: str, peer: Callable[[int], aggregation.Aggregator]) -> float:
    """Return the worst relative error to torchjd over random Jacobians."""
    worst = 0.0
    for count in range(2, 3 if method in ("pcgrad", "gradvac") else 11):
        for seed in range(5):
            generator = np.random.default_rng(100 * count + seed)
            jacobian = generator.normal(size=(count, count + 3))
            jacobian *= 10.0 ** generator.uniform(-0.3, 0.3, size=(count, 1))
            theirs = peer(count)(torch.from_numpy(jacobian)).numpy()
            ours, size = combination(method, jacobian), np.linalg.norm(theirs)
            apart = np.linalg.norm(ours) - size if method == "mgda" else np.linalg.norm(ours - theirs)
            worst = max(worst, float(abs(apart) / size))
    return worst


def main() -> None:
    """Print the table of errors and the worst of each column."""
    if "--rank" in sys.argv:
        rank, world, folder = sys.argv[sys.argv.index("--rank") + 1 :][:3]
        rank_main(int(rank), int(world), Path(folder))
        return
    two, three = rank_errors(2), rank_errors(3)
    known = {method: peer for method, peer in peers().items() if method in REGISTRY.names("balancer")}
    against = {method: torchjd_error(method, peer) for method, peer in known.items()}
    print(markdown_header(["method", "2 ranks", "3 ranks", "torchjd"]))
    for method in REGISTRY.names("balancer"):
        peer = f"{against[method]:.1e}" if method in against else "-"
        print(markdown_row([method, f"{two[method]:.1e}", f"{three[method]:.1e}", peer]))
    worst = [max(errors.values()) for errors in (two, three, against)]
    print(markdown_row(["worst", *(f"{error:.1e}" for error in worst)]))


if __name__ == "__main__":
    main()
