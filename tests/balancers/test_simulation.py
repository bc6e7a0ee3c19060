"""The study's controller simulation: no model, drawn gradient norms, the printed table for all five seeds.

The only trainable thing is a trunk of two parameters. Each task's loss is linear in it, with a direction
scaled to the drawn norm, so that the public call measures exactly the norms of the study's simulation.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtlbalance import GABALoss

STEPS_PER_EPOCH = 49
WARMUP_STEPS = 100
TABLE = {0: 0.5, 2: 0.5, 5: 0.1168, 7: 0.0497, 10: 0.0482, 20: 0.0477, 50: 0.0477, 100: 0.0477, 199: 0.0477}
RUL_DIRECTION = torch.tensor([0.6, 0.8], dtype=torch.float64)
HEALTH_DIRECTION = torch.tensor([-0.8, 0.6], dtype=torch.float64)


def draw_norms(seed: int, steps: int) -> np.ndarray:
    """The study draws g_rul, then g_h, at each step: rows of one stream of standard normals."""
    normals = np.random.default_rng(seed).standard_normal((steps, 2))
    return np.array([100.0, 0.20]) + np.array([5.0, 0.01]) * normals


def simulate(seed: int, epochs: int) -> tuple[list[float], list[float]]:
    """Return the applied and the smoothed weight of ``rul`` at every step."""
    balancer = GABALoss(tasks=("rul", "health"), beta=0.99, warmup_steps=WARMUP_STEPS, min_weight=0.05)
    trunk = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    applied, smoothed = [], []
    for rul_norm, health_norm in draw_norms(seed, epochs * STEPS_PER_EPOCH).tolist():
        trunk.grad = None
        losses = {
            "rul": rul_norm * (trunk @ RUL_DIRECTION),
            "health": health_norm * (trunk @ HEALTH_DIRECTION),
        }
        balancer(losses, shared_params=[trunk]).backward()
        report = balancer.report()
        assert report["grad_norm"]["rul"] == pytest.approx(rul_norm, rel=1e-6)
        applied.append(report["applied"]["rul"])
        smoothed.append(report["smoothed"]["rul"])
    return applied, smoothed


@pytest.mark.parametrize("seed", [42, 123, 456, 789, 1024])
def test_the_printed_table(seed: int) -> None:
    applied, smoothed = simulate(seed, epochs=200)
    at_first_step = {epoch: applied[epoch * STEPS_PER_EPOCH] for epoch in TABLE}
    assert at_first_step == pytest.approx(TABLE, abs=3e-4)
    # Four regimes: warm-up, drift, floor activation, equilibrium.
    assert applied[:WARMUP_STEPS] == [0.5] * WARMUP_STEPS
    assert smoothed[WARMUP_STEPS - 1] == 0.5
    below_floor = next(step for step, weight in enumerate(smoothed) if weight <= 0.05)
    assert below_floor - WARMUP_STEPS + 1 == pytest.approx(233, abs=3)
    assert applied[-1] == pytest.approx(0.05 / (0.05 + 0.998), abs=3e-4)


def test_the_drift_follows_the_closed_form() -> None:
    target = 0.2 / 100.2
    _, smoothed = simulate(seed=42, epochs=25)
    steps_of_drift = np.arange(1, len(smoothed) - WARMUP_STEPS + 1)
    expected = target + (0.5 - target) * 0.99**steps_of_drift
    np.testing.assert_allclose(smoothed[WARMUP_STEPS:], expected, atol=1e-4)


def test_drawing_rows_equals_drawing_in_turn() -> None:
    generator = np.random.default_rng(42)
    in_turn = [
        (100 + 5 * generator.standard_normal(), 0.20 + 0.01 * generator.standard_normal()) for _ in range(50)
    ]
    np.testing.assert_array_equal(draw_norms(42, 50), in_turn)
