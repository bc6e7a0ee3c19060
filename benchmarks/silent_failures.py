"""What happens where gradient balancing tends to go wrong without a word: this package beside torchjd, measured.

python benchmarks/silent_failures.py

Each situation is run for real with both, in the way the library's own documentation says, and the answer is a
measured number or the error that was raised. Needs torchjd (of the development dependencies).
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from measuring import markdown_header, markdown_row
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchjd.aggregation import Aggregator, CAGrad, ExcessMTL, GradVac, NashMTL, UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward
from torchjd.scalarization import DWA, FAMO

from mtlbalance import CAGradLoss, DWALoss, ExcessMTLLoss, FAMOLoss, NashMTLLoss, UPGradLoss
from mtlbalance.balancers.base import Balancer

TASKS = ("a", "b")
BATCH = 16
STEPS = 5


class Model(nn.Module):
    """A trunk and two linear heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})

    def forward(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the features and the predictions by task."""
        features = self.trunk(inputs)
        return features, {task: head(features).squeeze(-1) for task, head in self.heads.items()}


def data(step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return one batch."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, 5, generator=generator)
    return inputs, {task: 10.0 * torch.rand(BATCH, generator=generator) for task in TASKS}


def losses_of(predictions: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return mean squared errors; the second task's are a hundredth."""
    return {
        task: 100.0**-k * (predictions[task] - targets[task]).square().mean() for k, task in enumerate(TASKS)
    }


def backward_ours(balancer: Balancer, model: Model, losses: dict[str, Tensor], _: Tensor) -> None:
    """Deliver the balanced gradients."""
    balancer(losses, shared_params=model.trunk.parameters()).backward()


def backward_theirs(
    aggregator: Aggregator, model: Model, losses: dict[str, Tensor], features: Tensor
) -> None:
    """Deliver the aggregated gradients as in torchjd's multi-task example."""
    mtl_backward(list(losses.values()), features=features)
    jac_to_grad(model.trunk.parameters(), aggregator)


Backward = Callable[[Model, dict[str, Tensor], Tensor], None]


def ours(balancer: Balancer) -> Backward:
    """Bind a balancer."""
    return lambda model, losses, features: backward_ours(balancer, model, losses, features)


def theirs(aggregator: Aggregator) -> Backward:
    """Bind an aggregator."""
    return lambda model, losses, features: backward_theirs(aggregator, model, losses, features)


# ------------------------------------------------------------------ two ranks
def train(backward: Backward, rank: int | None) -> list[Tensor]:
    """Train a few steps, on one rank's half under DDP or on the whole batch, and return the parameters."""
    core = Model()
    model = core if rank is None else DistributedDataParallel(core)
    optimizer = torch.optim.SGD(core.parameters(), lr=0.05)
    half = BATCH // 2
    share = slice(None) if rank is None else slice(rank * half, (rank + 1) * half)
    for step in range(STEPS):
        inputs, targets = data(step)
        optimizer.zero_grad()
        features, predictions = model(inputs[share])
        losses = losses_of(predictions, {task: target[share] for task, target in targets.items()})
        backward(core, losses, features)
        optimizer.step()
    return [parameter.detach().clone() for parameter in core.parameters()]


def rank_main(rank: int, folder: Path) -> None:
    """Train as one of two ranks with each library and save what came out."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found = {"ours": train(ours(UPGradLoss(TASKS)), rank), "theirs": train(theirs(UPGrad()), rank)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference over the largest parameter."""
    size = max(tensor.abs().max().item() for tensor in other)
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True)) / size


def two_ranks() -> tuple[str, str]:
    """Compare ranks with each other and with one process on the whole batch."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--rank"]
        processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
        if any(process.wait(timeout=120) for process in processes):
            raise RuntimeError("a rank failed")
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    told = []
    for key, backward in (("ours", ours(UPGradLoss(TASKS))), ("theirs", theirs(UPGrad()))):
        apart = distance(ranks[0][key], ranks[1][key])
        off = distance(ranks[0][key], train(backward, None))
        told.append(f"ranks apart by {apart:.1e}, from one process by {off:.1e}")
    return told[0], told[1]


# ------------------------------------------------------------------ one process
def one_step(backward: Backward, change: Callable[[Model, dict[str, Tensor]], dict[str, Tensor]]) -> Model:
    """Deliver the gradients of one batch whose model or losses are changed first."""
    model = Model()
    inputs, targets = data(0)
    features, predictions = model(inputs)
    backward(model, change(model, losses_of(predictions, targets)), features)
    return model


def attempt(action: Callable[[], str]) -> str:
    """Return what the action says, or the first sentence of what it raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            said = action()
        except Exception as error:
            return f"raises {type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return said + ("; warns" if caught else "")


def first_weight(model: Model) -> Tensor:
    """Return the weight of the trunk's first layer."""
    weight = model.trunk[0].weight
    assert isinstance(weight, Tensor)
    return weight


def trunk_gradient(model: Model) -> Tensor:
    """Return the gradient of the trunk's first layer, zeros where it has none."""
    weight = first_weight(model)
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def parameter_hook(backward: Callable[[], Backward]) -> str:
    """Count how often a hook that doubles a gradient has doubled it."""

    def hooked(model: Model, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        first_weight(model).register_hook(lambda gradient: 2.0 * gradient)  # type: ignore[no-untyped-call]
        return losses

    plain = trunk_gradient(one_step(backward(), lambda _, losses: losses))
    found = trunk_gradient(one_step(backward(), hooked))
    return f"gradient is {(found.norm() / plain.norm()).item():.2f} times the one without (2.00 is right)"


def unrelated_task(backward: Callable[[], Backward]) -> str:
    """Give a task whose loss does not depend on the trunk at all."""

    def detached(model: Model, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return losses | {"b": model.heads["b"](torch.ones(1, 6)).sum()}

    model = one_step(backward(), detached)
    return f"trains on, gradient norm {trunk_gradient(model).norm().item():.2g}, nothing said"


def vanished_task(backward: Callable[[], Backward]) -> str:
    """Give a task that is solved: its loss and gradient are exactly zero."""
    model = one_step(backward(), lambda _, losses: losses | {"b": 0.0 * losses["b"]})
    share = (
        trunk_gradient(model).norm() / trunk_gradient(one_step(backward(), lambda _, losses: losses)).norm()
    )
    return f"the other task trains on with {share.item():.2g} of the usual gradient"


def poisoned(backward: Backward) -> str:
    """Overflow once, as a GradScaler does in its first steps, and look at the step after."""
    try:
        one_step(backward, lambda _, losses: {task: loss * torch.inf for task, loss in losses.items()})
        first = "delivers it for the scaler to skip"
    except Exception as error:
        first = f"raises {type(error).__name__}"
    after = trunk_gradient(one_step(backward, lambda _, losses: losses))
    return f"{first}; the next gradient is {'finite' if after.isfinite().all() else 'NaN for good'}"


def restored(make: Callable[[], nn.Module], drive: Callable[[nn.Module, int], object]) -> str:
    """Save after three calls, load into a fresh instance, and compare the fourth."""
    first = make()
    for step in range(3):
        drive(first, step)
    state = copy.deepcopy(first.state_dict())
    expected = drive(first, 3)
    second = make()
    second.load_state_dict(state)
    return "goes on alike" if drive(second, 3) == expected else "loads without a word and goes on differently"


def absent_ours() -> str:
    """Leave a task out of one batch and see whether what was learned of both is still there."""
    balancer = ExcessMTLLoss(TASKS)
    for step in range(3):
        drive_ours(balancer, step)
    before = balancer.squared_sums.clone()
    inputs, targets = data(3)
    model = Model()
    losses = losses_of(model(inputs)[1], targets)
    balancer({"a": losses["a"]}, shared_params=model.trunk.parameters())
    kept = bool((balancer.squared_sums >= before).all()) and torch.equal(balancer.squared_sums[1], before[1])
    return "the sums of both tasks are kept" if kept else "sums are lost"


def absent_theirs() -> str:
    """Leave a row out of one Jacobian and see whether what was learned of both is still there."""
    aggregator = ExcessMTL()
    for step in range(3):
        drive_aggregator(aggregator, step)
    before = aggregator.weighting._sq_grad_sum.clone()  # type: ignore[attr-defined]
    aggregator(torch.randn(1, 7))
    drive_aggregator(aggregator, 3)
    after = aggregator.weighting._sq_grad_sum
    kept = bool((after >= before).all())
    return "the sums of both tasks are kept" if kept else "starts all over, nothing said"


def drive_ours(balancer: nn.Module, step: int) -> object:
    """Make one call and return the weights that follow from it."""
    assert isinstance(balancer, Balancer)
    inputs, targets = data(step)
    model = Model()
    _, predictions = model(inputs)
    losses = losses_of(predictions, targets)
    balancer(losses, shared_params=model.trunk.parameters())
    if isinstance(balancer, FAMOLoss):
        balancer.update({task: loss.detach() * 0.5**k for k, (task, loss) in enumerate(losses.items())})
    balancer.end_epoch()
    return balancer.current_weights(torch.ones(2, dtype=torch.bool)).tolist()


def drive_aggregator(aggregator: nn.Module, step: int) -> object:
    """Aggregate one step's Jacobian."""
    generator = torch.Generator().manual_seed(step)
    torch.manual_seed(step)
    return aggregator(torch.randn(2, 7, generator=generator)).tolist()


def drive_famo(famo: nn.Module, step: int) -> object:
    """Make one call with its update and return the next total."""
    assert isinstance(famo, FAMO)
    values = torch.tensor([2.0, 1.0]) / (1 + step)
    famo(values)
    famo.update(values * torch.tensor([0.9, 0.5]))
    return famo(torch.tensor([2.0, 3.0])).item()


def drive_dwa(dwa: nn.Module, step: int) -> object:
    """Make one epoch of one call and return its total."""
    assert isinstance(dwa, DWA)
    total = dwa(torch.tensor([2.0, 1.0]) ** (1 + step)).item()
    dwa.step()
    return total


def rows() -> list[tuple[str, str, str]]:
    """Run every situation and return what each library did."""
    upgrad: tuple[Callable[[], Backward], Callable[[], Backward]] = (
        lambda: ours(UPGradLoss(TASKS)),
        lambda: theirs(UPGrad()),
    )
    found = [("two ranks under DDP, UPGrad, five steps", *two_ranks())]
    for name, measure in (
        ("a hook on a parameter that doubles its gradient", parameter_hook),
        ("a task whose loss does not reach the trunk", unrelated_task),
    ):
        found.append((name, attempt(lambda m=measure: m(upgrad[0])), attempt(lambda m=measure: m(upgrad[1]))))  # type: ignore[misc]
    for method, our, their in (("CAGrad", CAGradLoss, CAGrad), ("Nash-MTL", NashMTLLoss, NashMTL)):
        extra = {} if method == "CAGrad" else {"n_tasks": 2}
        options = {"c": 0.5} if method == "CAGrad" else extra
        found.append(
            (
                f"one task is solved (zero gradient), {method}",
                attempt(lambda o=our: vanished_task(lambda: ours(o(TASKS)))),  # type: ignore[misc]
                attempt(lambda t=their, k=options: vanished_task(lambda: theirs(t(**k)))),  # type: ignore[misc]
            )
        )
    found.append(
        (
            "one overflowing step, ExcessMTL",
            attempt(lambda: poisoned(ours(ExcessMTLLoss(TASKS)))),
            attempt(lambda: poisoned(theirs(ExcessMTL()))),
        )
    )
    found.append(
        ("a batch without labels for one task, ExcessMTL", attempt(absent_ours), attempt(absent_theirs))
    )
    for name, our_make, their_make, drive in (
        ("ExcessMTL", lambda: ExcessMTLLoss(TASKS), lambda: ExcessMTL(), drive_aggregator),
        ("FAMO", lambda: FAMOLoss(TASKS), lambda: FAMO(2), drive_famo),
        ("DWA", lambda: DWALoss(TASKS), lambda: DWA(), drive_dwa),
    ):
        found.append(
            (
                f"state saved, loaded into a fresh {name}",
                attempt(lambda m=our_make: restored(m, drive_ours)),  # type: ignore[misc]
                attempt(lambda m=their_make, d=drive: restored(m, d)),  # type: ignore[misc]
            )
        )
    found.append(
        (
            "state saved, loaded into a fresh GradVac",
            "-",
            attempt(lambda: restored(lambda: GradVac(), drive_aggregator)),
        )
    )
    return found


def main() -> None:
    """Print a Markdown table of all situations."""
    if "--rank" in sys.argv:
        rank_main(int(sys.argv[sys.argv.index("--rank") + 1]), Path(sys.argv[sys.argv.index("--folder") + 1]))
        return
    print("\n".join([markdown_header(["situation", "mtlbalance", "torchjd"])]))
    for row in rows():
        print(markdown_row(row), flush=True)


if __name__ == "__main__":
    main()
