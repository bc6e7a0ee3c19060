"""What is skipped where the host knows that every task takes part must change nothing."""

import math

import pytest
import torch

from mtlbalance import FixedWeightLoss
from mtlbalance.balancers.presence import (
    all_finite,
    choose,
    everyone,
    is_everyone,
    known_finite,
    moving,
    only,
    share_budget,
    share_of_present,
    softmax_of_present,
)

CPU = torch.device("cpu")
TRUE = torch.tensor(True)


@pytest.mark.parametrize("function", [share_budget, share_of_present, softmax_of_present])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_known_mask_gives_what_an_unknown_one_gives(function, count):
    weights_K = torch.rand(count, generator=torch.Generator().manual_seed(count)).softmax(0)
    unknown = torch.ones(count, dtype=torch.bool)
    assert is_everyone(everyone(count, CPU))
    assert not is_everyone(unknown)
    torch.testing.assert_close(function(weights_K, everyone(count, CPU)), function(weights_K, unknown))


@pytest.mark.parametrize("function", [share_budget, share_of_present])
def test_what_is_shared_is_never_the_state_itself(function):
    state_K = torch.tensor([0.3, 0.7])
    function(state_K, everyone(2, CPU)).zero_()
    assert state_K.tolist() == pytest.approx([0.3, 0.7])


def test_masks_choose():
    new_K, old_K = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])
    some = torch.tensor([True, False])
    assert choose(everyone(2, CPU), new_K, old_K) is new_K
    assert choose(some, new_K, old_K).tolist() == [1.0, 6.0]
    assert only(everyone(2, CPU), new_K) is new_K
    assert only(some, new_K).tolist() == [1.0, 0.0]


def test_nothing_moves_where_something_is_not_finite():
    present_K = everyone(2, CPU)
    assert moving(present_K, TRUE) is present_K
    assert moving(present_K, ~TRUE).tolist() == [False, False]
    assert moving(torch.tensor([True, False]), TRUE).tolist() == [True, False]


@pytest.mark.parametrize("count", [3, 100])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_finite_is_finite_whoever_looks(count, bad):
    values = torch.ones(count)
    if bad is not None:
        values[1] = bad
    assert bool(all_finite(values)) is (bad is None)
    assert known_finite(values) is (bad is None and count == 3)


def test_a_plugin_that_writes_into_its_mask_harms_nobody_else():
    class Writes(FixedWeightLoss):
        def weigh(self, signals):
            signals.present_K[0] = False
            return super().weigh(signals)

    losses = [torch.tensor(1.0, requires_grad=True) for _ in range(3)]
    written, untouched = Writes(("a", "b", "c")), FixedWeightLoss(("a", "b", "c"))
    written(*losses)
    assert written.get_weights()["a"] == 0.0
    untouched(*losses).backward()
    assert untouched.get_weights() == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert [loss.grad.item() for loss in losses] == pytest.approx([1 / 3] * 3)
