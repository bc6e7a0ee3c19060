"""The kit of datasets passes what is sound and names what is broken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from broken_datasets import BROKEN, SOUND

from mtlbalance.plugins import load_plugins
from mtlbalance.testing import DATASET_CHECKS, ConformanceError, check_dataset

EXAMPLE = Path(__file__).parents[2] / "examples" / "cmapss"
sys.path.insert(0, str(EXAMPLE))
SIMULATED = {"source": "simulated", "simulated_engines": 5}


def test_a_sound_dataset_passes():
    assert check_dataset(SOUND, {"samples": 30}).broken == ()


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_and_nothing_else(name):
    registration, expected = BROKEN[name]
    with pytest.raises(ConformanceError) as caught:
        check_dataset(registration)
    assert {outcome.check for outcome in caught.value.report.broken} == expected


def test_every_check_can_fail():
    assert {check.name for check in DATASET_CHECKS} == set().union(*(checks for _, checks in BROKEN.values()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("toy", {"samples": 40}),
        ("cmapss", SIMULATED),
        ("cmapss", SIMULATED | {"protocol": "honest", "subset": "FD002", "window": 20}),
    ],
)
def test_ours_pass(name, options):
    registry = load_plugins(["mtlbalance_cmapss"], EXAMPLE, entry_points=False)
    report = check_dataset(registry.get("dataset", name), options)
    assert report.applied == len(DATASET_CHECKS)
