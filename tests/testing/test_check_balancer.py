"""The kit passes what is sound, names what is broken, and says it so that an author understands."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from broken_balancers import (
    BROKEN,
    InverseLoss,
    InverseNorm,
    MeanOfTheSum,
    NoBalancer,
    PlainSum,
    SumOfGradients,
)

from mtlbalance import GABALoss
from mtlbalance.testing import BALANCER_CHECKS, ConformanceError, check_balancer


@pytest.mark.parametrize("cls", [InverseLoss, InverseNorm, PlainSum, SumOfGradients])
def test_a_sound_balancer_passes(cls):
    report = check_balancer(cls)
    assert report.broken == ()
    assert report.applied >= 25


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_what_is_broken_is_named_and_nothing_else(cls):
    with pytest.raises(ConformanceError) as caught:
        check_balancer(cls)
    assert {outcome.check for outcome in caught.value.report.broken} == BROKEN[cls]


def test_every_check_can_fail():
    assert {check.name for check in BALANCER_CHECKS} == set().union(*BROKEN.values())


def test_the_error_says_what_was_promised_expected_and_found():
    with pytest.raises(ConformanceError) as caught:
        check_balancer(MeanOfTheSum, only=["value_is_what_it_minimises"])
    assert str(caught.value).startswith("MeanOfTheSum breaks 1 of 2 checks:\n\nvalue_is_what_it_minimises\n")
    assert "  promised: The value is 0-d and Σ applied·loss" in str(caught.value)
    assert "  but: the value of call 1: expected " in str(caught.value)
    assert isinstance(caught.value, AssertionError)


def test_what_cannot_be_made_ends_it_at_once():
    with pytest.raises(ConformanceError, match="found NoBalancer") as caught:
        check_balancer(NoBalancer, only=["eval_moves_nothing"])
    assert len(caught.value.report.outcomes) == 1


def fails_while_it_is_made(tasks):
    return {}["nothing"]


def test_an_exception_is_reported_with_its_place():
    with pytest.raises(
        ConformanceError, match=r"it raised KeyError: 'nothing' \(.*test_check_balancer.py:\d+\)"
    ):
        check_balancer(fails_while_it_is_made)


def test_checks_can_be_chosen():
    report = check_balancer(GABALoss, only=["eval_moves_nothing"])
    assert [outcome.check for outcome in report.outcomes] == ["can_be_made", "eval_moves_nothing"]
    report = check_balancer(lambda tasks: MeanOfTheSum(tasks), skip=BROKEN[MeanOfTheSum])
    assert report.broken == ()
    with pytest.raises(ValueError, match="'eval_moves_nothin'; did you mean 'eval_moves_nothing'"):
        check_balancer(GABALoss, only=["eval_moves_nothin"])


def test_the_callers_generators_stay_where_they_were():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    check_balancer(InverseLoss)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_it_does_without_pytest():
    program = "import sys, mtlbalance.testing\nprint([n for n in sys.modules if n.startswith(('pytest', '_pytest'))])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
