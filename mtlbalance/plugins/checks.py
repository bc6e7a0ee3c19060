"""What a register hook returned, checked before anything relies on it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, get_args

from mtlbalance.errors import PluginError
from mtlbalance.plugins.registrations import (
    BackboneRegistration,
    BalancerRegistration,
    DatasetRegistration,
    EngineRegistration,
    PluginConfig,
    Registration,
    Slot,
)

SLOTS: tuple[Slot, ...] = get_args(Slot)
REGISTER_HOOKS: dict[str, type[Registration]] = {
    "register_datasets": DatasetRegistration,
    "register_backbones": BackboneRegistration,
    "register_balancers": BalancerRegistration,
    "register_engines": EngineRegistration,
}


def check_returned(hook: str, returned: Any) -> list[Registration]:
    """Return what ``hook`` gave as a list of valid registrations.

    Raises:
        PluginError: it is no list of registrations of that slot, or one of them is malformed.
    """
    expected = REGISTER_HOOKS[hook]
    if returned is None or not isinstance(returned, Iterable) or isinstance(returned, str | bytes):
        raise PluginError(
            f"{hook} returned {_a(returned)}, but must return a list of {expected.__name__} objects"
        )
    registrations: list[Registration] = []
    for item in returned:
        if not isinstance(item, expected):
            raise PluginError(f"{hook} gave {_a(item)}, but must give {expected.__name__} objects")
        _check_registration(item)
        if item.name in [earlier.name for earlier in registrations]:
            raise PluginError(f"{hook} gave the {item.slot} {item.name!r} twice")
        registrations.append(item)
    return registrations


def _check_registration(item: Registration) -> None:
    what = f"{item.slot} {item.name!r}"
    if not isinstance(item.name, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", item.name):
        raise PluginError(f"{what}: a name is in kebab case, such as 'my-{item.slot}'")
    if not isinstance(item.summary, str) or not item.summary.strip():
        raise PluginError(f"{what}: summary must be one line of text")
    if not (isinstance(item.config, type) and issubclass(item.config, PluginConfig)):
        raise PluginError(f"{what}: config must be a subclass of mtlbalance.plugins.PluginConfig")
    if "name" in item.config.model_fields:
        raise PluginError(f"{what}: its config cannot have an option 'name', which is the plugin's own name")
    if isinstance(item.build, str):
        if not re.fullmatch(r"[\w.]+:[\w.]+", item.build):
            raise PluginError(f"{what}: build {item.build!r} is not of the form 'module:attribute'")
    elif not callable(item.build):
        raise PluginError(f"{what}: build must be a callable or 'module:attribute', not {_a(item.build)}")
    if isinstance(item, DatasetRegistration) and not callable(item.tasks):
        raise PluginError(f"{what}: tasks must be a callable")
    if isinstance(item, BalancerRegistration) and item.check is not None and not callable(item.check):
        raise PluginError(f"{what}: check must be a callable")


def _a(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
