"""Loading plugins one at a time behind an error boundary, and looking them up by slot and name."""

from __future__ import annotations

import importlib.metadata
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import pluggy

from mtlbalance import __version__
from mtlbalance.errors import PluginError, did_you_mean
from mtlbalance.plugins import builtins, hookspecs
from mtlbalance.plugins.checks import REGISTER_HOOKS, SLOTS, check_returned
from mtlbalance.plugins.importing import (
    ModuleAddress,
    describe_failure,
    find_module,
    import_module,
    is_installed,
    module_files,
)
from mtlbalance.plugins.registrations import Registration

ENTRY_POINT_GROUP = "mtlbalance"


class PluginWarning(UserWarning):
    """An installed plugin is broken or clashes with another; everything else goes on without it."""


@dataclass(frozen=True)
class Origin:
    """Who brings a plugin: a distribution, ``built-in``, or a module that a config lists."""

    plugin: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.plugin} {self.version}".strip()


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be loaded.

    Args:
        name: the entry point's name, or the text in the config's list.
        origin: the distribution, or the listed module.
        reason: what went wrong, such as ``"ImportError: No module named 'x'"``.
        place: ``file:line`` where it went wrong, or an empty string.
        listed_index: its position in the config's ``plugins``, or None for an installed plugin.
    """

    name: str
    origin: Origin
    reason: str
    place: str = ""
    listed_index: int | None = None

    def __str__(self) -> str:
        who = f"plugin {self.name!r}"
        if self.listed_index is None:
            who += f" of distribution {self.origin}"
        return f"{who} cannot be used: {self.reason}" + (f" (at {self.place})" if self.place else "")


@dataclass(frozen=True)
class PluginRow:
    """A row of ``mtlbalance plugins list``; ``status`` is ``ok``, ``duplicate`` or ``broken``."""

    slot: str
    name: str
    summary: str
    plugin: str
    version: str
    status: str


@dataclass
class PluginRegistry:
    """Every plugin that could be loaded, by slot and name, and those that could not. See ``load_plugins``."""

    broken: list[BrokenPlugin] = field(default_factory=list)
    _resolved: list[str] = field(default_factory=list)
    _found: dict[tuple[str, str], list[tuple[Registration, Origin]]] = field(default_factory=dict)
    _observers: list[tuple[str, Origin]] = field(default_factory=list)
    _modules: set[str] = field(default_factory=set)
    _manager: pluggy.PluginManager = field(init=False)

    def __post_init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)

    @property
    def hook(self) -> Any:
        """The relay of pluggy: ``registry.hook.on_run_start(run_dir=..., config=...)`` calls every observer."""
        return self._manager.hook

    @property
    def resolved_plugins(self) -> tuple[str, ...]:
        """The listed plugins as a resolved config lists them: absolute paths, or installed module names."""
        return tuple(self._resolved)

    def names(self, slot: str) -> list[str]:
        """Return the names in ``slot``, sorted."""
        return sorted(name for found_slot, name in self._found if found_slot == slot)

    def get(self, slot: str, name: str) -> Registration:
        """Return the registration called ``name``.

        Raises:
            PluginError: there is none (the text lists what exists), or two plugins bring that name.
        """
        found = self._found.get((slot, name), [])
        if not found:
            names = self.names(slot)
            raise PluginError(
                f"unknown {slot} {name!r}{did_you_mean(name, names)}\navailable: {', '.join(names) or 'none'}"
            )
        if len(found) > 1:
            raise PluginError(_clash(slot, name, [origin for _, origin in found]))
        return found[0][0]

    def origin(self, slot: str, name: str) -> Origin:
        """Return who brings the registration called ``name``."""
        self.get(slot, name)
        return self._found[slot, name][0][1]

    def rows(self) -> list[PluginRow]:
        """Return the table of ``mtlbalance plugins list``: by slot and name, observers, then the broken ones."""
        rows = []
        for slot in SLOTS:
            for name in self.names(slot):
                found = self._found[slot, name]
                status = "ok" if len(found) == 1 else "duplicate"
                rows += [
                    PluginRow(slot, name, item.summary, origin.plugin, origin.version, status)
                    for item, origin in found
                ]
        rows += [
            PluginRow("observer", name, "watches runs", origin.plugin, origin.version, "ok")
            for name, origin in self._observers
        ]
        for plugin in self.broken:
            reason = plugin.reason + (f" (at {plugin.place})" if plugin.place else "")
            rows.append(
                PluginRow("", plugin.name, reason, plugin.origin.plugin, plugin.origin.version, "broken")
            )
        return rows

    def add(self, plugin: object, name: str, origin: Origin) -> None:
        """Register one plugin object, or nothing of it.

        Raises:
            PluginError: it implements no hook, an unknown one, or registers something malformed.
            Exception: whatever the plugin's own hooks raise.
        """
        try:
            self._manager.register(plugin, name=f"{origin}:{name}")
            _check_hooks(self._manager, plugin)
            registrations = [
                item
                for hook, function in _implementations(self._manager, plugin)
                if hook in REGISTER_HOOKS
                for item in check_returned(hook, function())
            ]
        except BaseException:
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            raise
        for item in registrations:
            self._found.setdefault((item.slot, item.name), []).append((item, origin))
        if not registrations:
            self._observers.append((name, origin))

    def clashes(self) -> list[str]:
        """Return a sentence for every name that two plugins bring."""
        return [
            _clash(slot, name, [origin for _, origin in found])
            for (slot, name), found in self._found.items()
            if len(found) > 1
        ]


def load_plugins(
    extra: Sequence[str] = (), base_dir: Path | None = None, entry_points: bool = True
) -> PluginRegistry:
    """Load the built-ins, the plugins that a config lists, and those installed under the entry-point group.

    A plugin that fails costs only itself: it becomes a ``BrokenPlugin`` in ``registry.broken``, with a
    ``PluginWarning`` when it is an installed one. Whoever passes ``extra`` reads the failures of those
    from ``registry.broken`` (``listed_index`` is set). A plugin both listed and installed is loaded once.

    Args:
        extra: a config's ``plugins``: names of installed modules, names of modules beside the config, or
            paths relative to it.
        base_dir: the config's folder; default: the current folder.
        entry_points: False leaves the installed plugins out.
    """
    registry = PluginRegistry()
    registry.add(builtins, "builtins", Origin("built-in", __version__))
    installed = list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)) if entry_points else []
    by_module = {_module(entry): entry for entry in installed}
    for index, listed in enumerate(extra):
        _load_listed(registry, index, listed, base_dir, by_module)
    for entry in sorted(installed, key=lambda entry: (_origin(entry).plugin, entry.name)):
        _load_entry_point(registry, entry)
    for sentence in registry.clashes():
        warnings.warn(sentence, PluginWarning, stacklevel=2)
    return registry


def _load_listed(
    registry: PluginRegistry,
    index: int,
    listed: str,
    base_dir: Path | None,
    by_module: dict[str, importlib.metadata.EntryPoint],
) -> None:
    address = ModuleAddress(listed, None, listed)
    entry = None
    try:
        address = find_module(listed, base_dir)
        if address.resolved in registry.resolved_plugins:
            return
        entry = by_module.get(address.module)
        plugin: object = import_module(address)
        if entry is not None and entry.attr:
            plugin = reduce(getattr, entry.attr.split("."), plugin)
        if registry._manager.is_registered(plugin):
            return
        origin = _origin(entry) if entry and is_installed(address) else Origin(address.module)
        registry.add(plugin, listed, origin)
    except (Exception, SystemExit) as error:
        reason, place = describe_failure(error, address.module)
        if isinstance(error, ModuleNotFoundError) and error.name == address.module.partition(".")[0]:
            reason, place = f"no module {listed!r} is installed, and none lies beside the config", ""
        registry.broken.append(BrokenPlugin(listed, Origin(listed), reason, place, index))
    else:
        registry._resolved.append(address.resolved)
        registry._modules |= {address.module, *module_files(plugin)}
    if entry is not None:  # loaded or broken, it has been dealt with
        registry._modules.add(address.module)


def _load_entry_point(registry: PluginRegistry, entry: importlib.metadata.EntryPoint) -> None:
    origin = _origin(entry)
    module = _module(entry)
    if module in registry._modules:
        return
    try:
        if not module:
            raise PluginError(
                f"its entry point {entry.value!r} is not of the form 'module' or 'module:object'"
            )
        plugin = entry.load()
        if registry._manager.is_registered(plugin) or module_files(plugin) & registry._modules:
            return
        registry.add(plugin, entry.name, origin)
        # Two entry points may share a module, each with its own object, so the module is not marked.
    except (Exception, SystemExit) as error:
        reason, place = describe_failure(error, module)
        broken = BrokenPlugin(entry.name, origin, reason, place)
        registry.broken.append(broken)
        warnings.warn(str(broken), PluginWarning, stacklevel=3)


def _origin(entry: importlib.metadata.EntryPoint) -> Origin:
    if entry.dist is None:
        return Origin(entry.value)
    return Origin(entry.dist.name, entry.dist.version)


def _module(entry: importlib.metadata.EntryPoint) -> str:
    try:
        return entry.module
    except (AttributeError, ValueError):  # how a malformed value shows depends on the Python version
        return ""


def _implementations(manager: pluggy.PluginManager, plugin: object) -> list[tuple[str, Any]]:
    return [
        (caller.name, impl.function)
        for caller in manager.get_hookcallers(plugin) or []
        for impl in caller.get_hookimpls()
        if impl.plugin is plugin
    ]


def _check_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    implementations = _implementations(manager, plugin)
    known = [name for name in vars(hookspecs) if name.startswith(("register_", "on_"))]
    if not implementations:
        raise PluginError("it implements no hook; decorate its functions with mtlbalance.plugins.hookimpl")
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        for name, function in implementations:
            if name not in known:
                code = inspect.unwrap(function).__code__
                raise PluginError(
                    f"unknown hook {name!r}{did_you_mean(name, known)} "
                    f"(at {code.co_filename}:{code.co_firstlineno})"
                ) from error
        raise


def _clash(slot: str, name: str, origins: list[Origin]) -> str:
    who = " and ".join(f"plugin {str(origin)!r}" for origin in origins)
    return f"the {slot} {name!r} is registered by {who}; uninstall or no longer list one of them"
