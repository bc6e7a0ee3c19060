"""The conformance checks of balancers, in the order in which a reader meets the promises."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from mtlbalance.plugins.registrations import BalancerRegistration
from mtlbalance.testing.balancers import absent, calls, gradients, nonfinite, phases, state, weights
from mtlbalance.testing.balancers.case import BalancerCase
from mtlbalance.testing.balancers.registered import registered_balancer
from mtlbalance.testing.checks import Checks, Report

BALANCER_CHECKS: Checks[BalancerCase] = Checks(
    calls.CHECKS,
    weights.CHECKS,
    absent.CHECKS,
    gradients.CHECKS,
    nonfinite.CHECKS,
    state.CHECKS,
    phases.CHECKS,
)

__all__ = ["BALANCER_CHECKS", "BalancerCase", "check_balancer", "registered_balancer"]


def check_balancer(
    make: Callable[..., Any] | BalancerRegistration,
    options: Mapping[str, Any] | None = None,
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> Report:
    """Hold a balancer to everything that mtlbalance promises of every balancer.

    Use it in the tests of your own balancer. What a method promises otherwise than most (``reads``, ``weight_sum``,
    ``shows``, ``signed_weights``, …) is stated on its class, see ``Balancer``, and read from there.

    Args:
        make: ``make(tasks) -> Balancer``: your class, or a function that fixes options. Where its signature names
            ``warmup_steps``, ``update_every``, ``delivery``, ``beta`` or ``max_weight``, the checks vary them; a
            function that does not should fix a short warm-up, or the checks see little else.
            It may also be the registration of a plugin, built as a config does.
        options: of a registration, by name, as in a config's ``[balancer]``. The checks' tasks are called a, b, c …
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
    if isinstance(make, BalancerRegistration):
        subject, case = make.name, registered_balancer(make, options)
    else:
        subject, case = getattr(make, "__name__", type(make).__name__), BalancerCase(make)
        if options:
            raise TypeError("options are for a registration; a function fixes its own")
    outcomes = tuple(BALANCER_CHECKS.examine(case, only=only, skip=skip))
    return Report(subject, outcomes).raise_if_broken()
