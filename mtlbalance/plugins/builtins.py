"""The built-in plugins, registered through the same hooks as anyone's. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mtlbalance.plugins.balancer_options import (
    AMNLOptions,
    FixedOptions,
    GABAOptions,
    GRACEOptions,
    check_balancer_options,
)
from mtlbalance.plugins.gramian_balancer_options import GRAMIAN_BALANCERS
from mtlbalance.plugins.hookspecs import hookimpl
from mtlbalance.plugins.jacobian_balancer_options import JACOBIAN_BALANCERS
from mtlbalance.plugins.loss_balancer_options import LOSS_BALANCERS
from mtlbalance.plugins.registrations import (
    BackboneRegistration,
    BalancerRegistration,
    DatasetRegistration,
    EngineRegistration,
    FromClass,
    PluginConfig,
)
from mtlbalance.slots import InputSpec, MultiTaskData, TaskSpec

if TYPE_CHECKING:
    from mtlbalance.backbones.mlp import MLP


class ToyOptions(PluginConfig):
    """Options of the ``toy`` dataset."""

    samples: int = Field(2000, ge=20, description="samples in all: 70 % train, 15 % validation, 15 % test")
    features: int = Field(8, ge=2, description="width of an input")
    noise: float = Field(0.05, ge=0, description="noise of the targets, as a share of their spread")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of the samples, apart from the run's seed")


class MLPOptions(PluginConfig):
    """Options of the ``mlp`` backbone."""

    hidden_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 64), min_length=1, description="width of each hidden layer; the last one gives the features"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after each hidden layer")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="after each hidden layer")


Device = Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$")]


class LocalOptions(PluginConfig):
    """Options of the engine ``local``."""

    per_device: int = Field(1, ge=1, description="runs at a time on each device")
    devices: Literal["auto"] | list[Device] = Field(
        "auto",
        min_length=1,
        description='such as ["cuda:0", "cuda:1"] or ["cpu"]; auto: every visible GPU, else the CPU',
    )


def toy_tasks(_: ToyOptions) -> tuple[TaskSpec, ...]:
    """Return the tasks of ``toy``: targets with a spread of 30 and of 0.1."""
    return (
        TaskSpec("large", "regression", "mse", metrics=("rmse",)),
        TaskSpec("small", "regression", "mse", metrics=("rmse",)),
    )


def build_toy(options: ToyOptions) -> MultiTaskData:
    """Draw the ``toy`` data."""
    from mtlbalance.datasets.toy import make_toy

    return make_toy(toy_tasks(options), options.samples, options.features, options.noise, options.seed)


def build_mlp(options: MLPOptions, inputs: InputSpec, _: Sequence[TaskSpec]) -> MLP:
    """Build the ``mlp`` for inputs of any shape."""
    from mtlbalance.backbones.mlp import MLP

    return MLP(math.prod(inputs.shape), options.hidden_sizes, options.dropout, options.activation)


@hookimpl
def register_datasets() -> list[DatasetRegistration]:
    """Return the built-in dataset."""
    return [
        DatasetRegistration(
            "toy",
            "two made-up regressions whose losses differ by a factor of 1e5",
            ToyOptions,
            build_toy,
            toy_tasks,
        )
    ]


@hookimpl
def register_backbones() -> list[BackboneRegistration]:
    """Return the built-in backbone."""
    return [
        BackboneRegistration(
            "mlp",
            "fully connected layers on the flattened input",
            MLPOptions,
            build_mlp,
        )
    ]


@hookimpl
def register_balancers() -> list[BalancerRegistration]:
    """Return the built-in balancers."""
    methods: list[tuple[str, str, type[PluginConfig], str]] = [
        ("fixed", "constant weights", FixedOptions, "mtlbalance.balancers.fixed:FixedWeightLoss"),
        (
            "amnl",
            "constant weights, and more weight for samples near failure",
            AMNLOptions,
            "mtlbalance.balancers.amnl:AMNLLoss",
        ),
        (
            "gaba",
            "weights against each task's share of the gradient norm",
            GABAOptions,
            "mtlbalance.balancers.gaba:GABALoss",
        ),
        (
            "grace",
            "gaba, and more weight for samples near failure",
            GRACEOptions,
            "mtlbalance.balancers.grace:GRACELoss",
        ),
    ]
    registrations = [
        BalancerRegistration(name, summary, options, FromClass(reference), check_balancer_options)
        for name, summary, options, reference in methods
    ]
    return [*registrations, *GRAMIAN_BALANCERS, *LOSS_BALANCERS, *JACOBIAN_BALANCERS]


@hookimpl
def register_engines() -> list[EngineRegistration]:
    """Return the built-in engine."""
    return [
        EngineRegistration(
            "local",
            "processes on this machine, some on every device",
            LocalOptions,
            "mtlbalance.sweeps.local:LocalEngine",
        )
    ]
