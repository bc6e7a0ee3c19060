"""The shared parameters (or representations) of a call: read from the argument, or discovered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mtlbalance.balancers.graph import trace
from mtlbalance.errors import SharedParametersError

_WHAT_TO_PASS = (
    "pass what the tasks share: shared_params=model.trunk.parameters(), the trunk module itself, "
    "or the features where trunk meets heads"
)


def list_shared(shared_params: Any) -> list[Tensor]:
    """Return the differentiable tensors of ``shared_params``, in order and each once.

    Args:
        shared_params: an iterable of parameters, a module, or one or more representation tensors.

    Raises:
        SharedParametersError: nothing in it can be differentiated; the text says why and what to pass.
    """
    if isinstance(shared_params, nn.Module):
        given: list[Any] = list(shared_params.parameters())
    elif isinstance(shared_params, Tensor):
        given = [shared_params]
    elif isinstance(shared_params, Mapping):
        given = list(shared_params.values())
    elif isinstance(shared_params, Iterable) and not isinstance(shared_params, str):
        given = list(shared_params)
    else:
        raise SharedParametersError(f"shared_params is a {type(shared_params).__name__}; {_WHAT_TO_PASS}")
    for item in given:
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            raise SharedParametersError(
                "shared_params holds (name, parameter) pairs; pass .parameters(), not .named_parameters()"
            )
        if not isinstance(item, Tensor):
            raise SharedParametersError(f"shared_params holds a {type(item).__name__}; {_WHAT_TO_PASS}")
    if not given:
        raise SharedParametersError(
            f"shared_params is empty; {_WHAT_TO_PASS} (a generator is used up by its first call: "
            "write model.trunk.parameters() inside the loop, or keep a list)"
        )
    differentiable = list({id(tensor): tensor for tensor in given if tensor.requires_grad}.values())
    if not differentiable:
        raise SharedParametersError(
            f"none of the {len(given)} tensors in shared_params requires a gradient (all frozen, or computed "
            f"without one); {_WHAT_TO_PASS}"
        )
    return differentiable


def discover_shared(losses: Mapping[str, Tensor], model: nn.Module) -> list[Tensor]:
    """Return the parameters of ``model`` that at least two of the losses reach, in the model's order."""
    reach = trace(list(losses.values()))
    if reach.opaque:
        raise hidden_heads("pass shared_params")
    several = {id(leaf) for leaf in reach.several}
    found: list[Tensor] = [parameter for parameter in model.parameters() if id(parameter) in several]
    if not found and _any_sharded(model.parameters()):
        raise _sharded("the model")
    if not found:
        raise SharedParametersError(
            f"no parameter of the model is reached by two of the losses {', '.join(map(repr, losses))}; {_WHAT_TO_PASS}"
        )
    return found


def missing_shared(method: str) -> SharedParametersError:
    """The error for a gradient-reading balancer that was called without anything to read."""
    return SharedParametersError(
        f"{method} reads gradients, so its call needs shared_params; {_WHAT_TO_PASS}"
    )


def hidden_heads(way_out: str) -> SharedParametersError:
    """The error for a graph that does not show which parameters belong to one task alone."""
    return SharedParametersError(
        "the model is compiled (or replicated) as a whole, which hides which parameters belong to one task alone; "
        f"compile the trunk and the heads each for itself, or {way_out}"
    )


def not_all_shared(method: str, left_out: Sequence[Tensor]) -> SharedParametersError:
    """The error for parameters of several tasks that a combination of gradients would not reach."""
    shapes = ", ".join(sorted(str(tuple(tensor.shape)) for tensor in left_out)[:4])
    more = f" and {len(left_out) - 4} more" if len(left_out) > 4 else ""
    return SharedParametersError(
        f"{method} combines the task gradients themselves, so shared_params must hold all that two tasks share, but "
        f"{len(left_out)} parameter(s) outside it are reached by several tasks (of shape {shapes}{more}); pass all of "
        "the trunk's parameters, or the features where trunk meets heads; model= finds them by itself"
    )


def unrelated_shared(task: str, shared: Sequence[Tensor]) -> SharedParametersError:
    """The error for a task whose loss does not depend on any shared tensor."""
    if _any_sharded(shared):
        return _sharded("shared_params")
    hint = ""
    if not any(tensor.is_leaf for tensor in shared):
        hint = "; DistributedDataParallel may return copies of a model's outputs: keep the features inside the model"
    return SharedParametersError(
        f"the loss of task {task!r} does not depend on any of the {len(shared)} tensors in shared_params; "
        f"{_WHAT_TO_PASS}{hint}"
    )


def _any_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(type(tensor.data).__name__ == "DTensor" for tensor in tensors)


def _sharded(where: str) -> SharedParametersError:
    return SharedParametersError(
        f"{where} holds sharded parameters (FSDP2): task gradients never arrive there; pass the shared features, where "
        "trunk meets heads, as shared_params"
    )
