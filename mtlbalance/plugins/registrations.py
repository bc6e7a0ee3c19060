"""What a plugin hands over: a name, a line of text, a config model and a way to build the thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from mtlbalance.plugins.references import import_reference
from mtlbalance.slots import TaskSpec

if TYPE_CHECKING:
    from torch import nn

    from mtlbalance.balancers.base import Balancer
    from mtlbalance.slots import InputSpec, MultiTaskData
    from mtlbalance.sweeps.engines import Engine

Slot: TypeAlias = Literal["dataset", "backbone", "balancer", "engine"]


class PluginConfig(BaseModel):
    """Base of every plugin's config: unknown keys are errors, values cannot change, numbers are finite.

    ``places`` names the options that only say where files lie, such as a data folder: they do not decide
    the result, so they are left out of a run's ``config_hash``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    places: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True)
class Problem:
    """A fault in a plugin's options that only shows once the tasks are known.

    Args:
        key: the option at fault, as written in its section (``"weights.ru"`` for a nested one).
        message: what is wrong.
        suggestion: what to do, or an empty string.
    """

    key: str
    message: str
    suggestion: str = ""


@dataclass(frozen=True)
class DatasetRegistration:
    """A dataset: ``build(config) -> MultiTaskData``.

    Args:
        name: what configs say, in kebab case.
        summary: one line for ``mtlbalance plugins list``.
        config: pydantic model of the options (``name`` itself excluded).
        build: a callable, or ``"module:attribute"`` imported only when a run starts.
        tasks: the tasks that a config gives, known without reading data or importing torch.
    """

    slot: ClassVar[Slot] = "dataset"
    name: str
    summary: str
    config: type[PluginConfig]
    build: str | Callable[[Any], MultiTaskData]
    tasks: Callable[[Any], Sequence[TaskSpec]]


@dataclass(frozen=True)
class BackboneRegistration:
    """A backbone: ``build(config, inputs, tasks) -> nn.Module``.

    The module has ``trunk`` (inputs -> features) and either ``heads`` (an ``nn.ModuleDict`` by task,
    features -> prediction) or ``feature_size`` (int), from which linear heads are made.
    """

    slot: ClassVar[Slot] = "backbone"
    name: str
    summary: str
    config: type[PluginConfig]
    build: str | Callable[[Any, InputSpec, Sequence[TaskSpec]], nn.Module]


@dataclass(frozen=True)
class FromClass:
    """A balancer's ``build`` for the usual case: the class takes the tasks' names, then every option by name.

    Args:
        reference: the class as ``"module:attribute"``, imported only when a balancer is built.
    """

    reference: str

    def __call__(self, config: PluginConfig, tasks: Sequence[TaskSpec]) -> Balancer:
        """Build the balancer for these options and tasks."""
        options = {name: getattr(config, name) for name in type(config).model_fields}
        balancer: Balancer = import_reference(self.reference)([task.name for task in tasks], **options)
        return balancer


@dataclass(frozen=True)
class BalancerRegistration:
    """A balancer: ``build(config, tasks) -> Balancer``.

    Args:
        name: what configs say, in kebab case.
        summary: one line for ``mtlbalance plugins list``.
        config: pydantic model of the options.
        build: a callable, or ``"module:attribute"``; ``FromClass("module:Class")`` for most classes.
        check: finds what only shows once the tasks are known, such as a weight for an unknown task.
    """

    slot: ClassVar[Slot] = "balancer"
    name: str
    summary: str
    config: type[PluginConfig]
    build: str | Callable[[Any, Sequence[TaskSpec]], Balancer]
    check: Callable[[Any, Sequence[TaskSpec]], Iterable[Problem]] | None = None


@dataclass(frozen=True)
class EngineRegistration:
    """Where the runs of a sweep are carried out: ``build(config) -> mtlbalance.sweeps.Engine``.

    Args:
        name: what ``mtlbalance sweep run --engine`` takes, in kebab case.
        summary: one line for ``mtlbalance plugins list``.
        config: pydantic model of the options; ``per_device`` and ``address`` have flags of their own.
        build: a callable, or ``"module:attribute"`` imported only when a sweep starts.
    """

    slot: ClassVar[Slot] = "engine"
    name: str
    summary: str
    config: type[PluginConfig]
    build: str | Callable[[Any], Engine]


Registration: TypeAlias = (
    DatasetRegistration | BackboneRegistration | BalancerRegistration | EngineRegistration
)
