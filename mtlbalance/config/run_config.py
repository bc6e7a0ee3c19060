"""A run's config, complete and checked: what ``load_config`` returns and the trainer reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import tomli_w

from mtlbalance.config.sections import RunSection, TrainingSection
from mtlbalance.plugins.registrations import (
    BackboneRegistration,
    BalancerRegistration,
    DatasetRegistration,
    PluginConfig,
    Registration,
)
from mtlbalance.slots import TaskSpec

if TYPE_CHECKING:
    from mtlbalance.plugins.manager import PluginRegistry

FREE_KEYS = frozenset(
    {
        "plugins",
        "run.name",
        "run.output_dir",
        "run.device",
        "run.keep_freed_memory",
        "run.preempt_signal",
        "training.checkpoint_minutes",
        "training.eval_batch_size",
        "training.gradient_stats_every",
        "training.num_workers",
    }
)

Registered = TypeVar("Registered", bound=Registration, covariant=True)


@dataclass(frozen=True, eq=False)
class Choice(Generic[Registered]):
    """The plugin chosen for a slot and its validated options; equal when name and options are."""

    registration: Registered
    options: PluginConfig

    @property
    def name(self) -> str:
        """The name in the config."""
        return self.registration.name

    def __eq__(self, other: object) -> bool:
        """Compare what the config says: a plugin's hook makes a new registration each time it is loaded."""
        if not isinstance(other, Choice):
            return NotImplemented
        return (self.name, self.options) == (other.name, other.options)

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Return the section as JSON values, the name first."""
        return {"name": self.name, **_without_none(self.options.model_dump(mode="json"))}


@dataclass(frozen=True)
class RunConfig:
    """One run: every section validated, every default filled in.

    Args:
        source: the file that it was read from, as the user named it.
        run: the ``[run]`` section.
        training: the ``[training]`` section.
        dataset: the dataset plugin and its options.
        backbone: the backbone plugin and its options.
        balancer: the balancer plugin and its options.
        tasks: the tasks that the dataset gives, known without reading data.
        plugins: the listed plugins: absolute paths, or names of installed modules.
        registry: every plugin that was found; ``registry.hook`` calls the observers.
        notices: what the user must know about how overrides were applied.
    """

    source: Path = field(compare=False)
    run: RunSection
    training: TrainingSection
    dataset: Choice[DatasetRegistration]
    backbone: Choice[BackboneRegistration]
    balancer: Choice[BalancerRegistration]
    tasks: tuple[TaskSpec, ...]
    plugins: tuple[str, ...]
    registry: PluginRegistry = field(compare=False, repr=False)
    notices: tuple[str, ...] = field(default=(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the whole config as JSON values; an option that is none is left out."""
        sections: dict[str, Any] = {"plugins": list(self.plugins)} if self.plugins else {}
        return sections | {
            "run": _without_none(self.run.model_dump(mode="json")),
            "dataset": self.dataset.to_dict(),
            "backbone": self.backbone.to_dict(),
            "balancer": self.balancer.to_dict(),
            "training": _without_none(self.training.model_dump(mode="json")),
        }

    def to_toml(self) -> str:
        """Return the whole config as TOML that can itself be run, from any folder."""
        return tomli_w.dumps(self.to_dict())

    def result_dict(self) -> dict[str, Any]:
        """Return the part of ``to_dict`` that decides the result: all but ``free_keys``."""
        free = self.free_keys()
        return {
            name: {key: value for key, value in section.items() if f"{name}.{key}" not in free}
            for name, section in self.to_dict().items()
            if name not in free
        }

    def free_keys(self) -> frozenset[str]:
        """Return the dotted keys that do not decide the result.

        The run's name, folder, device, signal and memory, how data is loaded and measured, how often a long epoch is
        saved, the plugins' paths, and what a plugin declares to be places.
        """
        slots: dict[str, PluginConfig] = {
            "dataset": self.dataset.options,
            "backbone": self.backbone.options,
            "balancer": self.balancer.options,
        }
        places = {f"{slot}.{key}" for slot, options in slots.items() for key in options.places}
        return FREE_KEYS | places

    def result_hash(self, data_source: str = "", protocol: str = "") -> str:
        """Return the SHA-256 of what decides the result: equal for runs that must give the same result.

        That is ``result_dict`` and, once the data has been found, what it is: one config may read other data
        where other files lie.

        Args:
            data_source: as the dataset's build says it.
            protocol: as the dataset's build says it.
        """
        decides = {"config": self.result_dict(), "data_source": data_source, "protocol": protocol}
        canonical = json.dumps(decides, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
