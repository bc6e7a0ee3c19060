"""N ranks equal one: real processes under DDP against one process on the whole batch."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtlbalance import GABALoss
from mtlbalance.balancers.gradient_balancer import GradientBalancer
from mtlbalance.errors import NonFiniteWarning, SharedParametersError
from mtlbalance.plugins.manager import load_plugins

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
WORKER = Path(__file__).with_name("ranks_worker.py")
BALANCERS = load_plugins(entry_points=False).names("balancer")


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    return load_worker()


@pytest.fixture(scope="session")
def launch(tmp_path_factory, testrun_uid) -> Callable[[int], list[dict]]:
    """Run the worker in so many processes, once, whichever of pytest's own processes asks first."""
    folder = tmp_path_factory.getbasetemp().parent / f"ranks-{testrun_uid}"

    @cache
    def results(world: int) -> list[dict]:
        place = folder / str(world)
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "lock"):
            if not (place / "done").exists():
                run(world, place)
                (place / "done").touch()
        return [torch.load(place / f"rank{rank}.pt", weights_only=True) for rank in range(world)]

    return results


def run(world: int, folder: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(WORKER)]
    rest = [str(world), str(folder / "store"), str(folder), ",".join(BALANCERS)]
    processes = [
        subprocess.Popen([*command, str(rank), *rest], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=900)[1] for process in processes]  # a hang ends after a minute
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)


@pytest.fixture(params=[2, 3])
def runs(request, launch) -> tuple[int, list[dict]]:
    return request.param, launch(request.param)


def reference(worker: ModuleType, method: str, name: str, world: int) -> dict:
    inputs, targets = worker.data(world)
    return worker.train(method, worker.scenarios()[name], 0, 1, inputs, targets)


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ranks_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def situations(**scenarios_of: list[str]):
    """Parametrise by ranks and scenario, each with the situation of docs/compatibility.md that it belongs to."""
    worker = load_worker()
    return pytest.mark.parametrize(
        ("runs", "name"),
        [
            pytest.param(world, scenario, marks=pytest.mark.situation(situation))
            for situation, scenarios in scenarios_of.items()
            for scenario in scenarios
            for world in (2, 3)
            if worker.runs_in(world, scenario)
        ],
        indirect=["runs"],
    )


def assert_equal(ranks: list[dict], key: str, expected: dict, *, weightless: bool) -> None:
    for found in (rank[key] for rank in ranks):
        for ours, theirs in zip(found["weights"], expected["weights"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, nan_ok=weightless)
        for ours, theirs in zip(found["parameters"], expected["parameters"], strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-9


@situations(
    **{
        "N ranks = 1": ["parameters", "weighted sum"],
        "task absent on a rank": [
            "absent on rank 1",
            "absent, by weighted sum",
            "empty on rank 1",
            "empty, by weighted sum",
            "low memory",
            "batched",
            "batched, empty",
        ],
        "no task on a rank": ["no task on rank 1"],
        "hooks, N ranks": ["hooks"],
    }
)
def test_ranks_equal_one_process(method, weightless, runs, worker, name):
    world, ranks = runs
    assert_equal(ranks, f"{method}/{name}", reference(worker, method, name, world), weightless=weightless)


@situations(
    **{
        "features, N ranks": ["features", "low memory, features"],
        "task absent on a rank": ["absent, features", "empty, features"],
        "no task on a rank": ["no task, features"],
        "FSDP2, features": ["sharded, features"],
    }
)
def test_features_equal_one_process(method, weightless, make, runs, worker, name):
    """Norms on the features of one rank's samples combine to the norm on the features of all samples."""
    if make(method).needs_parameters:
        pytest.skip("reads parameters only, and says so when it is given features")
    world, ranks = runs
    assert_equal(ranks, f"{method}/{name}", reference(worker, method, name, world), weightless=weightless)


@pytest.mark.situation("FSDP2, parameters")
@pytest.mark.parametrize("runs", [2], indirect=True)
def test_sharded_parameters_are_refused_with_the_way_out(method, runs, make, refuses):
    """Methods that read no gradient do not look at them."""
    _, ranks = runs
    balancer = make(method)
    for said in (rank[f"{method}/sharded"] for rank in ranks):
        for argument in ("shared_params", "model"):
            if isinstance(balancer, GradientBalancer):
                assert "sharded parameters (FSDP2)" in said[argument]
                assert "pass the shared features" in said[argument]
                refuses(
                    "no task gradient arrives at sharded parameters; pass the shared features as `shared_params`"
                )
            else:
                assert said[argument] == ""


@pytest.mark.parametrize("runs", [2], indirect=True)
def test_famo_updates_from_all_ranks(runs, worker):
    world, ranks = runs
    expected = reference(worker, "famo", "update after the step", world)
    without = reference(worker, "famo", "parameters", world)
    assert expected["following"] != without["following"]
    for found in (rank["famo/update after the step"] for rank in ranks):
        for ours, theirs in zip(found["weights"], expected["weights"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert found["weights"] == ranks[0]["famo/update after the step"]["weights"]


@pytest.mark.parametrize("runs", [2], indirect=True)
@pytest.mark.parametrize("sampling", ["sdmgrad", "modo"])
@pytest.mark.parametrize("name", ["a pair observed", "a pair observed, empty", "one observed"])
def test_observed_batches_are_of_all_ranks(sampling, name, runs, worker):
    """Exactly, with sync="norms" too: the product of two means is no mean of products."""
    world, ranks = runs
    expected = reference(worker, sampling, name, world)
    plain = {"missing": "absent on rank 1", "empty": "no task on rank 1"}
    plain = next((plain[key] for key in plain if key in worker.scenarios()[name]), "parameters")
    assert expected["weights"] != reference(worker, sampling, plain, world)["weights"]
    for found in (rank[f"{sampling}/{name}"] for rank in ranks):
        for ours, theirs in zip(found["weights"], expected["weights"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        for ours, theirs in zip(found["parameters"], expected["parameters"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


# Weights from squared lengths of gradients, which a mean of the ranks' own overrates by their variance.
FOLLOW_LENGTHS = ("moco",)


@pytest.mark.situation("sync='norms'")
def test_norms_are_an_approximation_that_all_ranks_share(method, weightless, runs, worker):
    world, ranks = runs
    exact = reference(worker, method, "parameters", world)["weights"]
    first = ranks[0][f"{method}/norms"]
    for other in ranks[1:]:
        assert weightless or other[f"{method}/norms"]["weights"] == first["weights"]
        for ours, theirs in zip(other[f"{method}/norms"]["parameters"], first["parameters"], strict=True):
            assert torch.equal(ours, theirs)
    if method in FOLLOW_LENGTHS:
        assert sum(first["weights"][0].values()) == pytest.approx(1.0)
        return
    assert first["weights"][0] == pytest.approx(exact[0], rel=0.5, abs=0.1, nan_ok=weightless)


@pytest.mark.situation("NaN on one rank")
def test_one_rank_that_overflows_stops_the_state_of_all(method, weightless, runs):
    _, ranks = runs
    seen = [rank[f"{method}/non-finite on rank 1"] for rank in ranks]
    assert [one["nonfinite"] for one in seen] == [1] * len(ranks)
    for one in seen:
        assert one["following"] == seen[0]["following"]
        if weightless:
            assert all(math.isnan(weight) for weights in one["weights"] for weight in weights.values())
            continue
        assert one["weights"] == seen[0]["weights"]
        assert one["weights"][2] == one["following"][1]


@pytest.mark.parametrize("runs", [2], indirect=True)
def test_without_synchronisation_gaba_drifts_apart(runs):
    """What the other modes are for; a test that could not fail would not show it."""
    _, ranks = runs
    weights = [rank["gaba/none"]["weights"][-1] for rank in ranks]
    assert weights[0] != weights[1]


NOTHING_ON_RANK_1 = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from mtlbalance import GABALoss
rank = int(sys.argv[1])
store, wait = f"file://{sys.argv[2]}", timedelta(seconds=20)
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=wait)
theta = torch.ones(2, requires_grad=True)
losses = {"a": theta.sum(), "b": theta.prod()} if rank == 0 else {}
GABALoss(("a", "b"))(losses, shared_params=[theta])
"""


def test_a_rank_that_gives_nothing_ends_all_ranks_in_time_and_says_what_to_give(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", NOTHING_ON_RANK_1]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode != 0 for process in processes)
    assert "the other ranks wait for this one: give it empty losses" in said[1]


def test_a_static_graph_is_refused(problem, tmp_path):
    p = problem()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = DistributedDataParallel(nn.ModuleList([p.trunk, p.heads]), static_graph=True)
        with pytest.raises(SharedParametersError, match="static_graph=False"):
            p.call(GABALoss(("a", "b")), model=model)
        wrapped = DistributedDataParallel(p.trunk, static_graph=True)  # and where the wrapper is not passed
        losses = p.per_sample(wrapped(p.inputs))
        with pytest.raises(SharedParametersError, match="static_graph=False"):
            GABALoss(("a", "b"))(losses, shared_params=p.trunk)
    finally:
        torch.distributed.destroy_process_group()


def test_the_reference_warns_as_usual(worker):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inputs, targets = worker.data(2)
        worker.train("gaba", {"bad": True}, 1, 1, inputs, targets)
    assert [warning.category for warning in caught] == [NonFiniteWarning]
