"""What a method prescribes, worked out beside the balancer under test: plain autograd in float64, summed by hand.

The method itself is asked through a twin whose graph is nothing but K dot products, so that no situation (a compiled
trunk, ranks, float16) can disturb it: the twin is given numbers, K losses and their gradients on what is shared, and
says how they combine. Everything else is done here: heads, parameters that some tasks share, the way down from
representations into the trunk.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Row = Sequence[Tensor | None]

TASKS = ("a", "b", "c")
STEPS = 4
OPTIONS = {"warmup_steps": 1, "beta": 0.5, "max_weight": 1.0}


class Twin:
    """A balancer of the same method that only ever sees L_k + g_k·(θ − θ₀), at θ = θ₀.

    A representation stays one, with its values: some methods look at the sign of an activation, and at its batch.

    Args:
        balancer: of the same method and options as the one under test.
        where: device and dtype of the numbers that it is given, where draws depend on them.
    """

    def __init__(self, balancer: nn.Module, **where: Any) -> None:
        self.balancer, self.where = balancer, where

    def combine(
        self, values: Sequence[Tensor], rows: Sequence[Row], shape_of: Sequence[Tensor], factor: float = 1.0
    ) -> tuple[list[Tensor], list[float], list[Tensor]]:
        """Return the combined gradient of tasks with these losses and gradients, their weights, and heads' factors.

        Gradient and factors of heads are multiplied by ``factor``.
        """
        there, dtype = values[0].device, values[0].dtype
        values = [value.detach().to(**self.where) for value in values]
        rows = [[None if g is None else g.to(**self.where) for g in row] for row in rows]
        shape_of = [t.detach().to(**self.where) if t.is_leaf else t.to(**self.where) for t in shape_of]
        leaves = [tensor.detach().clone().requires_grad_() for tensor in shape_of]
        theta = [leaf if t.is_leaf else leaf * 1.0 for leaf, t in zip(leaves, shape_of, strict=True)]
        tasks = self.balancer.tasks
        heads = [torch.zeros_like(value, requires_grad=True) for value in values]
        losses = {}  # per sample, of one sample: a method may have sample weights of its own
        for task, value, row, head in zip(tasks, values, rows, heads, strict=True):
            terms = [(g * (x - x.detach())).sum() for g, x in zip(row, theta, strict=True) if g is not None]
            losses[task] = torch.stack([value + head, *terms]).sum().reshape(1)
        targets = {task: torch.zeros_like(values[0]).reshape(1) for task in tasks}
        (self.balancer(losses, shared_params=theta, targets=targets) * factor).backward()
        combined = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        weights = list(self.balancer.get_weights().values())
        return [g.to(there, dtype) for g in combined], weights, [head.grad.to(there, dtype) for head in heads]


@dataclass(frozen=True)
class Prescribed:
    """Adds to ``.grad`` of plain parameters what the method prescribes, task by task.

    Args:
        twin: asked how the shared gradients combine.
        parameters: all parameters of the plain model, frozen and unused ones too.
    """

    twin: Twin
    parameters: Sequence[nn.Parameter]

    def accumulate(self, losses: Sequence[Tensor], shared: Iterable[Tensor], factor: float = 1.0) -> None:
        """Add the gradients of one batch, times ``factor``; ``shared`` is what the balancer under test reads."""
        shared = [tensor for tensor in shared if tensor.requires_grad]
        known = {id(tensor) for tensor in shared}
        trunk = self._below(shared)
        others = [p for p in self.parameters if p.requires_grad and id(p) not in known | set(trunk)]
        rows = [
            torch.autograd.grad(loss, [*shared, *others], retain_graph=True, allow_unused=True)
            for loss in losses
        ]
        values = [loss.detach() for loss in losses]
        reads = [row[: len(shared)] for row in rows]
        combined, weights, heads = self.twin.combine(values, reads, shared, factor)
        for tensor, total in zip(shared, combined, strict=True):
            if tensor.is_leaf and any(row[_index(shared, tensor)] is not None for row in rows):
                _add(tensor, total)
        if trunk:
            downward = torch.autograd.grad(
                shared, list(trunk.values()), combined, retain_graph=True, allow_unused=True
            )
            for parameter, gradient in zip(trunk.values(), downward, strict=True):
                _add(parameter, gradient)
        for position, parameter in enumerate(others, start=len(shared)):
            found = [(w, h, row[position]) for w, h, row in zip(weights, heads, rows, strict=True)]
            found = [(w, h, gradient) for w, h, gradient in found if gradient is not None]
            alone = len(found) == 1
            for weight, head, gradient in found:
                if not alone and math.isnan(weight):
                    raise NotImplementedError("a method without task weights has no say over this parameter")
                _add(parameter, (head if alone else weight * factor) * gradient)

    def _below(self, shared: Sequence[Tensor]) -> dict[int, nn.Parameter]:
        """Return the parameters that representations in ``shared`` are computed from."""
        features = [tensor for tensor in shared if not tensor.is_leaf]
        if not features:
            return {}
        candidates = [p for p in self.parameters if p.requires_grad]
        total = sum(tensor.sum() for tensor in features)
        found = torch.autograd.grad(total, candidates, retain_graph=True, allow_unused=True)
        return {id(p): p for p, gradient in zip(candidates, found, strict=True) if gradient is not None}


def _index(tensors: Sequence[Tensor], wanted: Tensor) -> int:
    return next(position for position, tensor in enumerate(tensors) if tensor is wanted)


def _add(parameter: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None:
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient


class Loop:
    """The same training twice: under the balancer, and plainly, with what the method prescribes.

    Args:
        balancer: the one under test.
        twin: a second one of the same method and options.
        problem: what is trained under the balancer; a plain copy of it, in float64, is trained beside it.
        device: where the one under test is trained.
        fused: of AdamW.
        max_norm: where gradients are clipped; None: nowhere.
        parts: micro-batches a step.
        on_device: whether the twin is there too, because draws differ between devices.
        rtol, atol: how far parameters may be from the plain ones.
    """

    def __init__(
        self,
        balancer: Any,
        twin: Any,
        problem: Any,
        *,
        device: str = "cpu",
        fused: bool = False,
        max_norm: float | None = None,
        parts: int = 1,
        on_device: bool = False,
        rtol: float = 1e-5,
        atol: float = 1e-7,
    ) -> None:
        self.ours, self.plain = problem, copy.deepcopy(problem)
        for module in (self.ours.trunk, self.ours.heads, balancer):
            module.to(device)
        self.plain.trunk.double()
        self.plain.heads.double()
        dtype = next(self.ours.trunk.parameters()).dtype
        self.balancer, self.twin = balancer, Twin(twin, dtype=dtype, device=device if on_device else "cpu")
        self.prescribed = Prescribed(self.twin, self.plain.parameters())
        self.device, self.max_norm, self.parts = device, max_norm, parts
        self.tolerance = {"rtol": rtol, "atol": atol}
        self.before_step: Callable[[], object] = lambda: None  # done to the plain gradients
        self.optimizers = [
            torch.optim.AdamW(
                [{"params": p.parameters()}, {"params": list(b.parameters()), "weight_decay": 0.0}],
                lr=1e-2,
                fused=fused,
            )
            for p, b in ((self.ours, balancer), (self.plain, twin))
        ]

    def run(
        self,
        losses: Callable[[], dict[str, Tensor]] | None = None,
        *,
        features: bool = False,
        shared: Callable[[Any], list[Tensor]] = lambda p: list(p.trunk.parameters()),
    ) -> None:
        """Train both for a few steps; ``losses`` computes those under the balancer in another way."""
        for _step in range(STEPS):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            for _ in range(self.parts):
                self.next_batch()
                found = None if losses else self.ours.trunk(self.ours.inputs)
                per_sample = losses() if losses else self.ours.per_sample(found)
                reads = found if features else shared(self.ours)
                total = self.balancer(per_sample, shared_params=reads, targets=self.ours.targets)
                (total / self.parts).backward()
                found = self.plain.trunk(self.plain.inputs)
                plain = [loss.mean() for loss in self.plain.per_sample(found).values()]
                reads = [found] if features else shared(self.plain)
                self.prescribed.accumulate(plain, reads, 1.0 / self.parts)
            self.before_step()
            for optimizer, p in zip(self.optimizers, (self.ours, self.plain), strict=True):
                if self.max_norm is not None:
                    nn.utils.clip_grad_norm_(p.parameters(), self.max_norm)
                optimizer.step()
            for balancer in (self.balancer, self.twin.balancer):
                balancer.end_epoch()
        self.assert_equal()

    def next_batch(self) -> None:
        """Draw a batch for both."""
        dtype = next(self.ours.trunk.parameters()).dtype
        inputs = torch.randn(self.plain.inputs.shape)
        targets = {task: 10.0 * torch.rand(target.shape) for task, target in self.plain.targets.items()}
        for p, kind in (
            (self.ours, {"device": self.device, "dtype": dtype}),
            (self.plain, {"dtype": torch.float64}),
        ):
            p.inputs = inputs.to(**kind)
            p.targets = {task: target.to(**kind) for task, target in targets.items()}

    def assert_equal(self) -> None:
        """Compare all parameters, the method's own among them, and the trunk's buffers."""
        ours = [*self.ours.parameters(), *self.balancer.parameters()]
        plain = [*self.plain.parameters(), *self.twin.balancer.parameters()]
        for one, other in zip(ours, plain, strict=True):
            assert (one.grad is None) == (other.grad is None)
            torch.testing.assert_close(one.cpu().double(), other.double(), **self.tolerance)
        for one, other in zip(self.ours.trunk.buffers(), self.plain.trunk.buffers(), strict=True):
            torch.testing.assert_close(one.cpu().double(), other.double(), **self.tolerance)
        assert self.balancer.num_nonfinite == 0


def amp_loop(
    balancer: Any, twin: Any, problem: Any, dtype: torch.dtype, scale: float, **where: Any
) -> tuple[float, int]:
    """Train under autocast, in float16 with a GradScaler, beside the plain loop; return the distance and the skips.

    Losses are multiplied by ``scale``. Gradients are clipped to one length, far below any that occurs, so that steps
    are equally long whatever the scale; the distance is that of the two ways gone, relative to the plain one's length.
    """
    loop = Loop(balancer, twin, problem, **where)
    device = loop.device
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16, backoff_factor=2.0**-6)
    groups = [list(p.parameters()) for p in (loop.ours, loop.plain)]
    start = torch.cat([parameter.detach().flatten().clone() for parameter in groups[1]])
    ours, plain = (torch.optim.SGD(group, lr=0.05 / 1e-9) for group in groups)
    steps = skips = 0
    while steps < 3:
        assert skips < 10, "the scaler finds no scale"
        loop.next_batch()
        ours.zero_grad()
        plain.zero_grad()
        with torch.autocast(device, dtype=dtype):
            features = loop.ours.trunk(loop.ours.inputs)
            predictions = {task: head(features).squeeze(-1) for task, head in loop.ours.heads.items()}
        losses = {
            task: scale * 0.1**k * (predictions[task].float() - loop.ours.targets[task]).square()
            for k, task in enumerate(loop.ours.tasks)
        }
        counted, before = balancer.num_nonfinite, scaler.get_scale()
        total = balancer(losses, shared_params=loop.ours.trunk.parameters(), targets=loop.ours.targets)
        scaler.scale(total).backward()
        scaler.unscale_(ours)
        nn.utils.clip_grad_norm_(groups[0], 1e-9)
        scaler.step(ours)
        scaler.update()
        if balancer.num_nonfinite == counted:  # else the state did not move, and the twin's must not
            found = loop.plain.trunk(loop.plain.inputs)
            exact = [
                scale
                * 0.1**k
                * (loop.plain.heads[task](found).squeeze(-1) - loop.plain.targets[task]).square().mean()
                for k, task in enumerate(loop.plain.tasks)
            ]
            loop.prescribed.accumulate(exact, loop.plain.trunk.parameters())
        if scaler.get_scale() < before:
            skips += 1
            continue
        nn.utils.clip_grad_norm_(groups[1], 1e-9)
        plain.step()
        steps += 1
    ways = [
        torch.cat([parameter.detach().cpu().double().flatten() for parameter in group]) - start
        for group in groups
    ]
    return float((ways[0] - ways[1]).norm() / ways[1].norm()), skips
