"""The conformance kit for authors of plugins, the same that our own tests run."""

from mtlbalance.testing.backbones import BACKBONE_CHECKS, BackboneCase, check_backbone
from mtlbalance.testing.balancers import BALANCER_CHECKS, BalancerCase, check_balancer, registered_balancer
from mtlbalance.testing.checks import Check, Checks, ConformanceError, Outcome, Report
from mtlbalance.testing.datasets import DATASET_CHECKS, DatasetCase, check_dataset

__all__ = [
    "BACKBONE_CHECKS",
    "BALANCER_CHECKS",
    "DATASET_CHECKS",
    "BackboneCase",
    "BalancerCase",
    "Check",
    "Checks",
    "ConformanceError",
    "DatasetCase",
    "Outcome",
    "Report",
    "check_backbone",
    "check_balancer",
    "check_dataset",
    "registered_balancer",
]
