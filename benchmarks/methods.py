"""Every registered balancer, made so that its first call already measures and weighs as all later ones do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtlbalance.balancers.base import Balancer
from mtlbalance.plugins.manager import load_plugins
from mtlbalance.plugins.references import resolve_build
from mtlbalance.slots import TaskSpec

REGISTRY = load_plugins(entry_points=False)
METHODS: tuple[str, ...] = tuple(REGISTRY.names("balancer"))
_READS_GRADIENTS = ("gradient norms", "gramian", "jacobian")
_EPOCH_STEPS = 100  # of those that work by epochs


def make(method: str, tasks: Sequence[str], **options: Any) -> Balancer:
    """Build a registered balancer, past its warm-up; ``options`` come first."""
    registration = REGISTRY.get("balancer", method)
    fields = registration.config.model_fields
    wanted: dict[str, Any] = {
        "biased_task": tasks[0],
        "target_cap": 10.0,
        "warmup_steps": 0,
        "nadir_steps": 1,
        "steps_per_epoch": _EPOCH_STEPS,
    }
    if method in ("gaba", "grace"):
        wanted["min_weight"] = 0.5 / len(tasks)
    kept = {key: value for key, value in wanted.items() if key in fields} | options
    specs = [TaskSpec(task, "regression", "mse") for task in tasks]
    balancer = resolve_build(registration)(registration.config(**kept), specs)
    assert isinstance(balancer, Balancer)
    return balancer


def reads_gradients(method: str) -> bool:
    """Return whether a method measures the tasks' gradients, and so needs more than one backward pass."""
    return make(method, ("a", "b")).reads in _READS_GRADIENTS


def per_sample_tasks(method: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks whose losses the method wants one a sample."""
    fields = REGISTRY.get("balancer", method).config.model_fields
    return (tasks[0],) if "biased_task" in fields else ()
