"""Every hook of mtlbalance. A plugin implements any of them with ``@hookimpl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pluggy

from mtlbalance.plugins.registrations import (
    BackboneRegistration,
    BalancerRegistration,
    DatasetRegistration,
    EngineRegistration,
)

PROJECT = "mtlbalance"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_datasets() -> Sequence[DatasetRegistration]:  # type: ignore[empty-body]
    """Return the datasets that this plugin brings."""


@hookspec
def register_backbones() -> Sequence[BackboneRegistration]:  # type: ignore[empty-body]
    """Return the backbones that this plugin brings."""


@hookspec
def register_balancers() -> Sequence[BalancerRegistration]:  # type: ignore[empty-body]
    """Return the balancers that this plugin brings."""


@hookspec
def register_engines() -> Sequence[EngineRegistration]:  # type: ignore[empty-body]
    """Return the engines that this plugin brings: where the runs of a sweep are carried out."""


@hookspec
def on_run_start(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Observe that a run starts (or resumes) in ``run_dir`` with this resolved config."""


@hookspec
def on_epoch_end(run_dir: Path, epoch: int, metrics: Mapping[str, float]) -> None:
    """Observe an epoch: ``metrics`` is the row just written to ``metrics.csv``."""


@hookspec
def on_run_end(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Observe that a run has ended: ``results`` is the content of ``results.json``."""
