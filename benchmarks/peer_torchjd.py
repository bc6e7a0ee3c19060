"""torchjd's step for the methods that it has, as its documentation writes it, in each of its engines.

``mtl_backward`` differentiates all tasks at once (vmap), or one after another with ``parallel_chunk_size=1``;
``autogram`` computes the Gramian without the Jacobian and then passes the trunk once more with the weights.
Shared and task parameters are named in the call, which saves it the walk through the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from variants import OptimizerForm, Training, Variant
from workloads import Workload

INSTALLED = find_spec("torchjd") is not None
METHODS = (
    "pcgrad",
    "upgrad",
    "cagrad",
    "nash-mtl",
    "mgda",
    "aligned-mtl",
    "imtl-g",
    "dualproj",
    "config",
    "gradvac",
    "graddrop",
    "krum",
    "trimmed-mean",
    "fairgrad",
)
WITH_GRAMIAN = ("pcgrad", "upgrad", "mgda", "aligned-mtl", "imtl-g", "dualproj", "krum")
TIMED_BY_AUTOGRAM = ("pcgrad", "upgrad", "mgda")  # what the engine costs is alike for all


def aggregator(method: str, count: int) -> Any:
    """Return torchjd's aggregator for K tasks, with its own defaults where it has some."""
    from torchjd import aggregation

    makers: dict[str, Callable[[], Any]] = {
        "pcgrad": aggregation.PCGrad,
        "upgrad": aggregation.UPGrad,
        "cagrad": lambda: aggregation.CAGrad(c=0.5),
        "nash-mtl": lambda: aggregation.NashMTL(n_tasks=count),
        "mgda": aggregation.MGDA,
        "aligned-mtl": aggregation.AlignedMTL,
        "imtl-g": aggregation.IMTLG,
        "dualproj": aggregation.DualProj,
        "config": aggregation.ConFIG,
        "gradvac": aggregation.GradVac,
        "graddrop": aggregation.GradDrop,
        "krum": lambda: aggregation.Krum(n_byzantine=max(0, (count - 3) // 2)),
        "trimmed-mean": lambda: aggregation.TrimmedMean(trim_number=count // 4),
        "fairgrad": lambda: aggregation.FairGrad(alpha=1.0),
    }
    return makers[method]()


def weighting(method: str) -> Any:
    """Return what turns a Gramian into weights."""
    from torchjd import aggregation

    makers: dict[str, Callable[[], Any]] = {
        "pcgrad": aggregation.PCGradWeighting,
        "upgrad": aggregation.UPGradWeighting,
        "mgda": aggregation.MGDAWeighting,
        "aligned-mtl": aggregation.AlignedMTLWeighting,
        "imtl-g": aggregation.IMTLGWeighting,
        "dualproj": aggregation.DualProjWeighting,
        "krum": lambda: aggregation.KrumWeighting(n_byzantine=0),
    }
    return makers[method]()


def jacobian_steps(
    workload: Workload, optimizer: OptimizerForm, method: str, chunk: int | None
) -> Iterator[None]:
    """Store the Jacobian and combine its rows."""
    from torchjd.autojac import jac_to_grad, mtl_backward

    training = Training(workload, optimizer)
    combine = aggregator(method, len(workload.tasks)).to(workload.inputs.device)
    of_tasks = [list(training.heads[task].parameters()) for task in workload.tasks]
    while True:
        training.optimizer.zero_grad()
        features, losses = training.forward()
        mtl_backward(
            list(losses.values()),
            features=features,
            tasks_params=of_tasks,
            shared_params=training.shared,
            parallel_chunk_size=chunk,
        )
        jac_to_grad(training.shared, combine)
        training.optimizer.step()
        yield


def gramian_steps(workload: Workload, optimizer: OptimizerForm, method: str) -> Iterator[None]:
    """Compute the Gramian with the autogram engine and differentiate the weighted losses."""
    from torchjd.autogram import Engine

    training = Training(workload, optimizer)
    weigh = weighting(method)

    engine = Engine(training.trunk, batch_dim=None)  # a loss is the mean over its batch
    while True:
        training.optimizer.zero_grad()
        _, losses = training.forward()
        stacked = torch.stack(list(losses.values()))
        weights = weigh(engine.compute_gramian(stacked))
        stacked.backward(weights)  # type: ignore[no-untyped-call]
        training.optimizer.step()
        yield


def _jacobian_variant(method: str, form: str, chunk: int | None) -> Variant:
    def steps(workload: Workload, optimizer: OptimizerForm) -> Iterator[None]:
        return jacobian_steps(workload, optimizer, method, chunk)

    return Variant("torchjd", method, form, steps)


def _gramian_variant(method: str) -> Variant:
    def steps(workload: Workload, optimizer: OptimizerForm) -> Iterator[None]:
        return gramian_steps(workload, optimizer, method)

    return Variant("torchjd", method, "autogram", steps)


def variants(wanted: Collection[str], *, timed: bool) -> list[Variant]:
    """Return torchjd's variants of the wanted methods; for timing not every method in the autogram engine."""
    by_autogram = TIMED_BY_AUTOGRAM if timed else WITH_GRAMIAN
    found = []
    for method in METHODS:
        if method not in wanted:
            continue
        found += [_jacobian_variant(method, "", None), _jacobian_variant(method, "sequential", 1)]
        if method in by_autogram:
            found.append(_gramian_variant(method))
    return found
