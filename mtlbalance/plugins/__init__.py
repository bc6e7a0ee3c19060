"""The plugin system: three slots (dataset, backbone, balancer) filled through pluggy hooks."""

from mtlbalance.plugins.hookspecs import hookimpl
from mtlbalance.plugins.registrations import (
    BackboneRegistration,
    BalancerRegistration,
    DatasetRegistration,
    PluginConfig,
    Problem,
)
from mtlbalance.slots import InputSpec, MultiTaskData, TaskSpec

__all__ = [
    "BackboneRegistration",
    "BalancerRegistration",
    "DatasetRegistration",
    "InputSpec",
    "MultiTaskData",
    "PluginConfig",
    "Problem",
    "TaskSpec",
    "hookimpl",
]
