"""The two-task problem of the CAGrad, Nash-MTL and FAMO papers: who reaches the Pareto set, and from where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtlbalance import FixedWeightLoss, IMTLGLoss, MGDALoss, NashMTLLoss

STARTS = [(-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)]


def losses(point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = point
    # clamp passes the gradient where it is met with equality; a strict maximum would freeze at (0, 0)
    h1 = torch.log((0.5 * (-x - 7) - torch.tanh(-y)).abs().clamp(min=5e-6)) + 6
    h2 = torch.log((0.5 * (-x + 3) + torch.tanh(-y) + 2).abs().clamp(min=5e-6)) + 6
    q1 = ((7 - x) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20
    q2 = ((x + 7) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20
    c1, c2 = torch.tanh(y / 2).clamp(min=0), torch.tanh(-y / 2).clamp(min=0)
    return 0.1 * (c1 * h1 + c2 * q1), c1 * h2 + c2 * q2


def descend(balancer, start: tuple[float, float], lr: float = 0.15, steps: int = 500) -> torch.Tensor:
    point = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([point], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        balancer(*losses(point), shared_params=[point]).backward()
        optimizer.step()
        schedule.step()
    return point.detach()


def distance_to_stationarity(point: torch.Tensor) -> float:
    """Length of the shortest convex combination of the gradients, relative to the longer gradient."""
    point = point.clone().requires_grad_()
    first, second = (torch.autograd.grad(losses(point)[k], point)[0].double().numpy() for k in (0, 1))
    a, b, c = first @ first, first @ second, second @ second
    share = np.clip((c - b) / (a + c - 2 * b), 0, 1)
    return float(np.linalg.norm(share * first + (1 - share) * second) / np.sqrt(max(a, c)))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("cls", [MGDALoss, IMTLGLoss, NashMTLLoss])
def test_they_reach_the_pareto_set_from_everywhere(cls, start):
    point = descend(cls(("first", "second")), start)
    assert distance_to_stationarity(point) < 0.05
    assert point[1] < -6  # on the way down to the set at -8.36, not at a wall above
    assert -7.2 <= point[0] <= 7.2


def test_the_plain_sum_is_stuck_from_the_corner_and_one_sided_elsewhere():
    plain = FixedWeightLoss(("first", "second"), weights=(1.0, 1.0))
    assert descend(plain, (9.0, 9.0), lr=0.02, steps=1500)[1] > 0
    assert descend(plain, (-8.5, 7.5))[0] == pytest.approx(-5.73, abs=0.3)
