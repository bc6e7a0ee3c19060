"""The options of balancers that weigh no Gramian are the arguments of their classes, and know the tasks."""

from __future__ import annotations

import inspect

import pytest
from pydantic import ValidationError

from mtlbalance import UncertaintyLoss
from mtlbalance.plugins import FromClass, TaskSpec, import_reference, resolve_build
from mtlbalance.plugins.jacobian_balancer_options import JACOBIAN_BALANCERS
from mtlbalance.plugins.loss_balancer_options import LOSS_BALANCERS, check_by_task
from mtlbalance.plugins.registrations import BalancerRegistration

TASKS = (TaskSpec("rul", "regression", "mse"), TaskSpec("health", "classification", "cross_entropy", 3))
REGISTRATIONS = [*LOSS_BALANCERS, *JACOBIAN_BALANCERS]
BY_NAME = {registration.name: registration for registration in REGISTRATIONS}


@pytest.mark.parametrize("registration", REGISTRATIONS, ids=list(BY_NAME))
def test_options_are_the_arguments_of_the_class(registration: BalancerRegistration) -> None:
    build = registration.build
    cls = import_reference(build.reference) if isinstance(build, FromClass) else UncertaintyLoss
    parameters = inspect.signature(cls).parameters
    arguments = {
        key: parameter.default
        for key, parameter in parameters.items()
        if key not in ("tasks", "process_group")  # a process group is no text
    }
    options = {key: field.default for key, field in registration.config.model_fields.items()}
    assert options == arguments
    assert all(field.description for field in registration.config.model_fields.values())
    assert type(resolve_build(registration)(registration.config(), TASKS)) is cls


def test_uncertainty_takes_the_kinds_of_the_tasks() -> None:
    registration = BY_NAME["uncertainty"]
    build = resolve_build(registration)
    assert build(registration.config(), TASKS).get_weights() == {"rul": 0.5, "health": 1.0}
    kinds = {"rul": "regression", "health": "regression"}
    assert build(registration.config.model_validate({"kinds": kinds}), TASKS).get_weights() == {
        "rul": 0.5,
        "health": 0.5,
    }
    with pytest.raises(ValidationError):
        registration.config.model_validate({"kinds": {"rul": "regresion"}})


@pytest.mark.parametrize(
    ("name", "options", "problems"),
    [
        ("famo", {"min_losses": {"rul": 0.0, "health": 0.1}}, []),
        ("famo", {"min_losses": [0.0]}, [("min_losses", "1 values for 2 tasks")]),
        (
            "stch",
            {"preference": {"rul": 1.0, "helth": 2.0}},
            [("preference.helth", "unknown task 'helth'"), ("preference", "no value for 'health'")],
        ),
        ("pbi", {"ideal": {"rul": 1.0}}, [("ideal", "no value for 'health'")]),
        ("graddrop", {"leak": 0.5}, []),
        ("graddrop", {"leak": {"rul": 0.0, "health": 1.0}}, []),
        ("graddrop", {"leak": [0.5]}, [("leak", "1 values for 2 tasks")]),
        ("graddrop", {"leak": {"helth": 0.5}}, [("leak.helth", "'helth'"), ("leak", "no value for")]),
        ("uncertainty", {"kinds": {"rul": "regression"}}, [("kinds", "no value for 'health'")]),
    ],
)
def test_values_by_task_are_checked_against_the_tasks(
    name: str, options: dict[str, object], problems: list[tuple[str, str]]
) -> None:
    found = list(check_by_task(BY_NAME[name].config.model_validate(options), TASKS))
    assert [problem.key for problem in found] == [key for key, _ in problems]
    for problem, (_, message) in zip(found, problems, strict=True):
        assert message in problem.message
    if name == "stch":
        assert found[0].suggestion == "did you mean 'health'?"
