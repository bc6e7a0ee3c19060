"""What balancers read from the graph: per-task gradients on the shared tensors, and their norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtlbalance.balancers.graph import casts_to_half
from mtlbalance.balancers.losses import name_losses, no_losses, reduce_losses
from mtlbalance.balancers.probe_scale import half_scale
from mtlbalance.balancers.shared import list_shared, unrelated_shared
from mtlbalance.errors import InvalidArgumentError, SharedParametersError

Gradients = list[Tensor | None]  # one a tensor that was differentiated; None where the loss does not reach it


class Signals(NamedTuple):
    """What a balancer weighs. All tensors are detached, on the losses' device, with K entries in task order.

    Args:
        losses_K: the losses, averaged over ranks; 0 where the task is absent.
        present_K: True where some rank has the task in this call.
        grad_norms_K: L2 norms of the task gradients on the shared tensors, 0 where absent; None if not
            measured in this call.
        finite: 0-d bool; False if any present loss or measured gradient is NaN or infinite. State moves only
            where it is True.
        gramian_KK: inner products of the task gradients, 0 in the rows and columns of absent tasks; None if
            the method does not read it, or it was not measured in this call.
    """

    losses_K: Tensor
    present_K: Tensor
    grad_norms_K: Tensor | None
    finite: Tensor
    gramian_KK: Tensor | None = None


def task_gradients(
    loss: Tensor, tensors: Sequence[Tensor | GradientEdge], *, retain_graph: bool
) -> Gradients:
    """Differentiate one loss with respect to ``tensors``; None where it does not reach one."""
    try:
        found = torch.autograd.grad(loss, tensors, retain_graph=retain_graph, allow_unused=True)  # type: ignore[arg-type]
        return list(found)
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise SharedParametersError(
            "a module compiled by torch.compile gives up its buffers in its first backward pass, but task gradients "
            "need one pass a task; set torch._functorch.config.donated_buffer = False before it is compiled, or, "
            "if it is the trunk, pass its features as shared_params"
        ) from error


@contextmanager
def as_if_unseen(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Differentiate by ``tensors`` without running their hooks, or leaving anything where ``retain_grad()`` was called.

    Both are for the gradient that ``backward()`` hands over, not for those of the probes.
    """
    hooked = [(hooks, dict(hooks)) for tensor in tensors if (hooks := tensor._backward_hooks)]
    retained = [
        (tensor, tensor.grad) for tensor in tensors if tensor.grad_fn is not None and tensor.retains_grad
    ]
    for hooks, _ in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, items in hooked:
            hooks.update(items)
        for tensor, grad in retained:
            tensor.grad = grad


def gradient_norm(gradients: Gradients, device: torch.device) -> Tensor:
    """Return the joint L2 norm as a 0-d tensor of at least float32 on ``device``, without a host sync."""
    dense = [_values(gradient) for gradient in gradients if gradient is not None]
    if not dense:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(dense, 2.0, dtype=_norm_dtype(dense))
    joint: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
    return joint


def gradient_norms(rows: Sequence[Gradients], device: torch.device) -> Tensor:
    """Return (K,) `gradient_norm` of K tasks' gradients, in three operations if they have the same tensors."""
    dense = [[gradient for gradient in row if gradient is not None] for row in rows]
    flat = [gradient for row in dense for gradient in row]
    kind = common_kind(flat)
    if kind is None or not kind.dtype.is_floating_point or len({len(row) for row in dense}) > 1:
        return torch.stack([gradient_norm(row, device) for row in rows])
    norms = torch.stack(torch._foreach_norm(flat, 2.0, dtype=_norm_dtype(flat[:1])))
    joint_K: Tensor = torch.linalg.vector_norm(norms.view(len(rows), -1), dim=1)
    return joint_K if kind.device == device else joint_K.to(device)


class Kind(NamedTuple):
    """What plain tensors have in common that one operation may take together."""

    dtype: torch.dtype
    device: torch.device


def common_kind(tensors: Sequence[Tensor]) -> Kind | None:
    """Return the dtype and device of plain dense tensors that all have the same, else None."""
    kinds = {(tensor.dtype, tensor.device, tensor.layout, type(tensor)) for tensor in tensors}
    if len(kinds) != 1:
        return None
    dtype, device, layout, cls = kinds.pop()
    return Kind(dtype, device) if layout == torch.strided and cls is Tensor else None


def task_gradient_norms(
    losses: Mapping[str, Tensor], shared_params: Any, *, retain_graph: bool = True
) -> dict[str, Tensor]:
    """Measure how hard each task pulls at the shared parameters, without balancing anything.

    Use it beside any balancer or training loop, before the backward pass:
    n_k = ‖∂L_k/∂θ‖₂ over all shared parameters θ.

    Args:
        losses: task name -> loss, 0-d or per sample (B,), then averaged.
        shared_params: an iterable of parameters, a module, or representation tensor(s).
        retain_graph: keep the graph, so that the losses can be differentiated afterwards (default True).

    Returns:
        Task name -> 0-d tensor on the device of its loss. Nothing is copied to the host, no ``.grad`` is
        touched. Under several ranks the norms are those of this rank's losses.

    Cost: one backward pass through heads and trunk a task; the gradients of one task at a time in memory.

    Raises:
        SharedParametersError: ``shared_params`` is empty or unrelated to one of the losses.
        InvalidArgumentError: a loss does not require a gradient.

    Example:
        >>> import torch
        >>> theta = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> norms = task_gradient_norms({"a": (theta**2).sum() / 2, "b": theta[0]}, [theta])
        >>> {task: norm.item() for task, norm in norms.items()}
        {'a': 5.0, 'b': 1.0}

    Source: the gradient-norm measurement of the C-MAPSS study, over any shared tensors.
    """
    shared = list_shared(shared_params)
    present, _ = name_losses((losses,), tuple(losses))
    if not present:
        raise no_losses(tuple(losses), several_ranks=False)
    reduced = reduce_losses(present, {})
    in_half = any(tensor.dtype == torch.float16 for tensor in shared) or casts_to_half(reduced.values())
    norms: dict[str, Tensor] = {}
    for position, (task, loss) in enumerate(reduced.items()):
        require_differentiable(task, loss)
        retain = retain_graph or position + 1 < len(reduced)
        scale = half_scale(loss) if in_half else torch.ones((), device=loss.device)
        gradients = task_gradients(loss * scale, shared, retain_graph=retain)
        require_related(task, gradients, shared)
        norms[task] = gradient_norm(gradients, loss.device) / scale
    return norms


def require_differentiable(task: str, loss: Tensor) -> None:
    """Raise unless the loss has a graph to differentiate."""
    if not loss.requires_grad:
        raise InvalidArgumentError(
            f"the loss of task {task!r} does not require a gradient, so its pull on the shared parameters cannot "
            "be measured; compute it from the model's output, without detach() or no_grad()"
        )


def require_related(task: str, gradients: Gradients, shared: Sequence[Tensor]) -> None:
    """Raise if the loss reaches none of the shared tensors: no gradient is not the same as a zero one."""
    if all(gradient is None for gradient in gradients[: len(shared)]):
        raise unrelated_shared(task, shared)


def real_parts(values: Tensor) -> Tensor:
    """Return complex numbers as pairs of real ones, and real ones as they are."""
    return torch.view_as_real(values) if values.is_complex() else values


def _norm_dtype(values: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(each.dtype == torch.float64 for each in values) else torch.float32


def _values(gradient: Tensor) -> Tensor:
    """Return the numbers that count for a norm: of a sparse gradient its values, of a complex one both parts."""
    return real_parts(gradient.coalesce().values() if gradient.is_sparse else gradient)
