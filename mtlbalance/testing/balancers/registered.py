"""A registered balancer as the checks make it: through its registration, with its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtlbalance.balancers.checks import task_names
from mtlbalance.plugins.references import import_reference, resolve_build
from mtlbalance.plugins.registrations import BalancerRegistration, FromClass
from mtlbalance.slots import TaskSpec
from mtlbalance.testing.balancers.case import BalancerCase


def registered_balancer(
    registration: BalancerRegistration, options: Mapping[str, Any] | None = None
) -> BalancerCase:
    """Return the case of a registered balancer.

    Args:
        registration: whose config is filled with ``options``; checks vary the others.
        options: by name, as a config's section. The checks' tasks are called a, b, c …; there is always an ``a``.
    """
    fixed = dict(options or {})

    def make(tasks: Any, **varied: Any) -> Any:
        if not isinstance(tasks, tuple | list) and isinstance(registration.build, FromClass):
            return import_reference(registration.build.reference)(tasks, **fixed)  # it refuses them
        config = registration.config(**(varied | fixed))
        specs = [TaskSpec(task, "regression", "mse") for task in task_names(tasks)]
        return resolve_build(registration)(config, specs)

    return BalancerCase(make, accepts=set(registration.config.model_fields) - set(fixed))
