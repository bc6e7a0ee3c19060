"""The conformance checks of balancers, in the order in which a reader meets the promises."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from mtlbalance.testing.balancers import absent, calls, gradients, nonfinite, state, weights
from mtlbalance.testing.balancers.case import BalancerCase
from mtlbalance.testing.checks import Checks, Report

BALANCER_CHECKS: Checks[BalancerCase] = Checks(
    calls.CHECKS, weights.CHECKS, absent.CHECKS, gradients.CHECKS, nonfinite.CHECKS, state.CHECKS
)

__all__ = ["BALANCER_CHECKS", "BalancerCase", "check_balancer"]


def check_balancer(
    make: Callable[..., Any], *, only: Collection[str] | None = None, skip: Collection[str] = ()
) -> Report:
    """Hold a balancer to everything that mtlbalance promises of every balancer.

    Use it in the tests of your own balancer. What a method promises otherwise than most (``reads``, ``weight_sum``,
    ``shows``, ``signed_weights``, …) is stated on its class, see ``Balancer``, and read from there.

    Args:
        make: ``make(tasks) -> Balancer``: your class, or a function that fixes options. Where its signature names
            ``warmup_steps``, ``update_every``, ``delivery``, ``beta`` or ``max_weight``, the checks vary them; a
            function that does not should fix a short warm-up, or the checks see little else.
        only: the names of the checks to run; default: all.
        skip: the names of checks to leave out.

    Returns:
        The report: the outcome of each check.

    Raises:
        ConformanceError: promises are broken; the text lists what was expected and what was found.
        ValueError: ``only`` or ``skip`` names no check.

    Example:
        >>> from mtlbalance import GABALoss
        >>> report = check_balancer(GABALoss, only=["eval_moves_nothing", "copies_go_on_alike"])
        >>> [(outcome.check, outcome.status) for outcome in report.outcomes]
        [('can_be_made', 'kept'), ('eval_moves_nothing', 'kept'), ('copies_go_on_alike', 'kept')]
    """
    subject = getattr(make, "__name__", type(make).__name__)
    outcomes = tuple(BALANCER_CHECKS.examine(BalancerCase(make), only=only, skip=skip))
    return Report(subject, outcomes).raise_if_broken()
