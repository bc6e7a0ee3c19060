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


def simulate(seed: int, steps: int, read_every: int) -> dict[int, dict[str, dict[str, float]]]:
    """Return the balancer's report after every ``read_every``-th step, by step."""
    balancer = GABALoss(tasks=("rul", "health"), beta=0.99, warmup_steps=WARMUP_STEPS, min_weight=0.05)
    trunk = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    shared = [trunk]
    reports = {}
    for step, (rul_norm, health_norm) in enumerate(draw_norms(seed, steps).tolist()):
        losses = {
            "rul": trunk @ (rul_norm * RUL_DIRECTION),
            "health": trunk @ (health_norm * HEALTH_DIRECTION),
        }
        trunk.grad = None
        balancer(losses, shared_params=shared).backward()
        if step % read_every == 0:
            reports[step] = report = balancer.report()
            assert report["grad_norm"] == pytest.approx({"rul": rul_norm, "health": health_norm}, rel=1e-6)
    return reports


# Two seeds to the end; the others past epoch 50, where nothing but noise far below the floor is left.
@pytest.mark.parametrize(("seed", "epochs"), [(42, 200), (123, 51), (456, 51), (789, 51), (1024, 200)])
def test_the_printed_table(seed: int, epochs: int) -> None:
    reports = simulate(seed, epochs * STEPS_PER_EPOCH, read_every=STEPS_PER_EPOCH)
    expected = {epoch: weight for epoch, weight in TABLE.items() if epoch < epochs}
    applied = {epoch: reports[epoch * STEPS_PER_EPOCH]["applied"]["rul"] for epoch in expected}
    assert applied == pytest.approx(expected, abs=3e-4)


def test_the_four_regimes() -> None:
    reports = simulate(seed=42, steps=500, read_every=1)
    applied = [report["applied"]["rul"] for report in reports.values()]
    smoothed = [report["smoothed"]["rul"] for report in reports.values()]
    assert applied[:WARMUP_STEPS] == smoothed[:WARMUP_STEPS] == [0.5] * WARMUP_STEPS, "warm-up"
    target = 0.2 / 100.2
    steps_of_drift = np.arange(1, len(smoothed) - WARMUP_STEPS + 1)
    expected = target + (0.5 - target) * 0.99**steps_of_drift
    np.testing.assert_allclose(smoothed[WARMUP_STEPS:], expected, atol=1e-4, err_msg="drift")
    reached = next(step for step, weight in enumerate(smoothed) if weight <= 0.05)
    assert reached - WARMUP_STEPS + 1 == pytest.approx(233, abs=1), "the floor is reached"
    settled = [0.05 / (0.05 + 1 - weight) for weight in smoothed[reached:]]
    assert applied[reached:] == pytest.approx(settled, abs=1e-6), "equilibrium on the floor"


def test_drawing_rows_equals_drawing_in_turn() -> None:
    generator = np.random.default_rng(42)
    in_turn = [
        (100 + 5 * generator.standard_normal(), 0.20 + 0.01 * generator.standard_normal()) for _ in range(50)
    ]
    np.testing.assert_array_equal(draw_norms(42, 50), in_turn)
