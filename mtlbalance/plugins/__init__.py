"""The plugin system: the slots (dataset, backbone, balancer; engine for sweeps) filled through pluggy hooks."""

from mtlbalance.plugins.hookspecs import hookimpl
from mtlbalance.plugins.manager import BrokenPlugin, PluginRegistry, PluginRow, PluginWarning, load_plugins
from mtlbalance.plugins.references import build_plugin, import_reference, resolve_build
from mtlbalance.plugins.registrations import (
    BackboneRegistration,
    BalancerRegistration,
    DatasetRegistration,
    EngineRegistration,
    FromClass,
    PluginConfig,
    Problem,
    Registration,
    Slot,
)
from mtlbalance.slots import InputSpec, MultiTaskData, TaskSpec

__all__ = [
    "BackboneRegistration",
    "BalancerRegistration",
    "BrokenPlugin",
    "DatasetRegistration",
    "EngineRegistration",
    "FromClass",
    "InputSpec",
    "MultiTaskData",
    "PluginConfig",
    "PluginRegistry",
    "PluginRow",
    "PluginWarning",
    "Problem",
    "Registration",
    "Slot",
    "TaskSpec",
    "build_plugin",
    "hookimpl",
    "import_reference",
    "load_plugins",
    "resolve_build",
]
