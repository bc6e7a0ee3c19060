"""Import strings: ``"module:attribute"`` turned into the thing itself, with clear errors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mtlbalance.errors import MtlBalanceError, PluginError, did_you_mean
from mtlbalance.plugins.importing import describe_failure

if TYPE_CHECKING:
    from mtlbalance.plugins.registrations import Registration


def import_reference(reference: str) -> Any:
    """Import ``"module:attribute"`` (the attribute may be dotted).

    >>> import_reference("os.path:join").__name__
    'join'

    Raises:
        PluginError: the text has another form, the module cannot be imported, or it lacks the attribute.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise PluginError(f"{reference!r} is not of the form 'module:attribute'")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise PluginError(f"cannot import {module_name!r} for {reference!r}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise PluginError(f"{reference!r}: there is no {part!r}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


def resolve_build(registration: Registration) -> Callable[..., Any]:
    """Return the callable behind a registration's ``build``, importing it when it is an import string.

    Raises:
        PluginError: the import string leads nowhere, or to something that cannot be called.
    """
    build: Any = registration.build
    if isinstance(build, str):
        try:
            build = import_reference(build)
        except PluginError as error:
            raise PluginError(
                f"{registration.slot} {registration.name!r} cannot be built: {error}"
            ) from error
    if not callable(build):
        raise PluginError(
            f"{registration.slot} {registration.name!r} cannot be built: {registration.build!r} is not callable"
        )
    return build  # type: ignore[no-any-return]


def build_plugin(registration: Registration, *arguments: Any) -> Any:
    """Call a registration's ``build``.

    Raises:
        PluginError: it fails; the text names the slot, the plugin, and the file and line.
        MtlBalanceError: what the plugin itself raises to tell the user.
    """
    build = resolve_build(registration)
    try:
        return build(*arguments)
    except MtlBalanceError:
        raise
    except Exception as error:
        reason, place = describe_failure(error, getattr(build, "__module__", ""))
        at = f" (at {place})" if place else ""
        raise PluginError(
            f"{registration.slot} {registration.name!r} cannot be built: {reason}{at}"
        ) from error
