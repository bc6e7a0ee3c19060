"""What a graphed step decides on the host, which needs no GPU; replays themselves are in test_cuda_graphs.py."""

from __future__ import annotations

import pytest
import torch

from mtlbalance import Balancer, DWALoss, FixedWeightLoss, GraphedStep
from mtlbalance.errors import InvalidArgumentError
from mtlbalance.testing.balancers.phases import operations_of_calls

TASKS = ("a", "b", "c")
OPTIONS = {"warmup_steps": 3, "update_every": 4, "steps_per_epoch": 5}
# Why these stay off graphs; every other method can be captured.
REFUSED = {
    "draws": {"rlw", "rgw"},
    "to the host": {
        "aligned-mtl",
        "cagrad",
        "config",
        "cr-mogm",
        "dualproj",
        "fairgrad",
        "gradvac",
        "imtl-g",
        "krum",
    }
    | {"mgda", "modo", "nash-mtl", "pcd", "pcgrad", "sdmgrad", "upgrad"},
    "seeds": {"graddrop"},
}


def nothing(*batch):
    raise AssertionError("the step was called")


def refusal_of(balancer, **options):
    parameters = [torch.nn.Parameter(torch.ones(2)), *balancer.parameters()]
    optimizer = torch.optim.AdamW(parameters, **{"capturable": True} | options)
    with pytest.raises(InvalidArgumentError) as caught:
        GraphedStep(nothing, balancer, optimizer, device="cpu")
    return str(caught.value)


def test_a_method_is_refused_with_its_reason_or_lacks_a_gpu_alone(make, method):
    reasons = [reason for reason, methods in REFUSED.items() if method in methods]
    text = refusal_of(make(method, TASKS))
    if not reasons:
        assert text.startswith("CUDA graphs need a CUDA device; device is 'cpu'")
        return
    assert text.startswith(f"a step with {make(method, TASKS).get_name()} cannot be captured")
    assert reasons[0] in text
    assert "call the step itself" in text


def test_counters_that_are_moved_as_in_an_earlier_call_of_the_phase_are_those_of_calls(make, method, problem):
    """What a replay does on the host, beside a twin that makes every call."""
    moved, called, p = make(method, TASKS, **OPTIONS), make(method, TASKS, **OPTIONS), problem(TASKS)
    if moved.obstacle_to_graphs():
        pytest.skip("is never captured")
    moves_of = {}
    replays = 0
    for step in range(23):
        assert moved.phase() == called.phase()
        phase, before = moved.phase(), moved.host_counters()
        p.call(called).backward()
        if phase in moves_of:
            moved.move_counters(moves_of[phase])
            replays += 1
        else:
            p.call(moved).backward()
            moves_of[phase] = moved.counters_since(before)
        assert moved.host_counters() == called.host_counters()
        if step == 11:
            moved.end_epoch()
            called.end_epoch()
    assert called.calls == 23
    assert replays >= 15


def test_dwa_closes_its_epochs_in_a_phase_of_their_own():
    calls = operations_of_calls(DWALoss(("a", "b"), steps_per_epoch=3), 7)[1:]
    closing = [calls[1], calls[4]]
    assert closing[0] == closing[1]
    assert calls[0] == calls[2] == calls[3] == calls[5]
    assert closing[0] != calls[0]
    balancer = DWALoss(("a", "b"), steps_per_epoch=3)
    phases = []
    for _ in range(6):
        phases.append(balancer.phase())
        balancer(torch.ones(()), torch.ones(()))
    assert phases == [(False,), (False,), (True,)] * 2


def test_a_class_with_counters_of_its_own_must_say_what_they_decide():
    class Counts(FixedWeightLoss):
        _counters = ("calls", "seen")
        seen = 0

    assert "Counts has counters of its own, and no phase()" in refusal_of(Counts(TASKS))

    class Says(Counts):
        def phase(self):
            return (self.seen > 3,)

    assert "need a CUDA device" in refusal_of(Says(TASKS))
    assert isinstance(Says(TASKS), Balancer)


def test_an_optimizer_that_counts_on_the_host_is_refused():
    assert "build it with capturable=True" in refusal_of(FixedWeightLoss(TASKS), capturable=False)


def test_a_learning_rate_on_the_host_is_refused():
    assert "'lr' of AdamW is a tensor on cpu" in refusal_of(FixedWeightLoss(TASKS), lr=torch.tensor(1e-3))


def test_float16_is_refused(make, problem):
    balancer, p = make("gaba", TASKS), problem(TASKS)
    with torch.autocast("cpu", dtype=torch.float16):
        losses = p.losses()
    p.call(balancer, losses).backward()
    assert "GradScaler decides on the host; use bfloat16" in refusal_of(balancer)
