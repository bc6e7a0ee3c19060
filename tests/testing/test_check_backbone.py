"""The kit of backbones passes what is sound and names what is broken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from broken_backbones import BROKEN, SOUND

from mtlbalance.plugins import InputSpec, TaskSpec, load_plugins
from mtlbalance.testing import BACKBONE_CHECKS, BackboneCase, ConformanceError, check_backbone

EXAMPLE = Path(__file__).parents[2] / "examples" / "cmapss"
sys.path.insert(0, str(EXAMPLE))
SMALL = {"hidden_size": 6, "cnn_channels": (5, 7), "num_attention_heads": 3, "fc_dims": (8, 4)}


def test_a_sound_backbone_passes():
    assert check_backbone(SOUND).broken == ()


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_and_nothing_else(name):
    registration, expected = BROKEN[name]
    with pytest.raises(ConformanceError) as caught:
        check_backbone(registration)
    assert {outcome.check for outcome in caught.value.report.broken} == expected


def test_every_check_can_fail():
    checks = {check.name for check in BACKBONE_CHECKS}
    assert checks == set().union(*(checks for _, checks in BROKEN.values()))


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("mlp", {"hidden_sizes": (4,)}, (8,)),
        ("mlp", {"dropout": 0.5, "activation": "tanh"}, (8,)),
        ("cnn-bilstm-attention", SMALL, (16, 8)),
        ("cnn-bilstm-attention", SMALL | {"use_attention": False, "num_lstm_layers": 1}, (16, 8)),
    ],
)
def test_ours_pass(name, options, shape):
    registry = load_plugins(["mtlbalance_cmapss"], EXAMPLE, entry_points=False)
    registration = registry.get("backbone", name)
    assert BackboneCase(registration, options).inputs.shape == shape
    assert check_backbone(registration, options).broken == ()


def test_inputs_and_tasks_may_be_given():
    report = check_backbone(SOUND, inputs=InputSpec((3,)), tasks=[TaskSpec("one", "regression", "mse")])
    assert report.applied == len(BACKBONE_CHECKS) - 1
