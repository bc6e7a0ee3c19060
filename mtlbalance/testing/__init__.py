"""The conformance kit for authors of plugins, the same that our own tests run."""

from mtlbalance.testing.balancers import BALANCER_CHECKS, BalancerCase, check_balancer
from mtlbalance.testing.checks import Check, Checks, ConformanceError, Outcome, Report

__all__ = [
    "BALANCER_CHECKS",
    "BalancerCase",
    "Check",
    "Checks",
    "ConformanceError",
    "Outcome",
    "Report",
    "check_balancer",
]
