"""A whole training step as CUDA graphs: forward, balancing, backward and optimizer in one launch."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias, overload

import torch
from torch import Tensor

from mtlbalance.balancers.base import Balancer
from mtlbalance.balancers.checks import integer
from mtlbalance.balancers.ranks import active_ranks
from mtlbalance.errors import CaptureError, InvalidArgumentError, MtlBalanceError, RecapturedWarning

Part: TypeAlias = Tensor | Mapping[str, Tensor]  # an argument of a step, or what it returns
Key: TypeAlias = tuple[Hashable, ...]


class GraphedStep:
    """Run a training step, its balancer included, as CUDA graphs: one launch a step, nothing of it in Python.

    Use it on a GPU where the step is a matter of launching kernels: small models, small batches, many tasks. **It has
    not run on a GPU yet**: what is decided on the host is tested, replays are not. Compare its first hundred losses
    with those of ``step`` itself.

    ``step`` is an ordinary function of one batch: forward, balancer, ``backward()``, clipping, ``optimizer.step()``. It
    is run as it is for the first calls, then captured, and from then on replayed. What a call issues depends on
    counters that the balancer keeps on the host: is it warming up, does it measure now, how long ago did it last? So
    there is a graph for each ``balancer.phase()`` and shape of the batch, for GABA with ``update_every=10`` one for
    measured calls and one for the others. A replay moves the counters as the call itself would have.

    Args:
        step: called with the batch, in memory that is the same in every call; returns a tensor, or a mapping of tensors
            by name, or None. It calls the balancer once. Nothing in it may wait for the device (``.item()``,
            ``print(loss)``, indexing by a mask), and Python in it (counters, schedulers) runs in the first calls only.
        balancer: the balancer that ``step`` calls.
        optimizer: the one that ``step`` steps, with ``capturable=True`` if it has that option. Gradients are cleared
            before each call, so they do not accumulate over calls. Its settings are constants of the graphs: where one
            changes, the graphs are dropped and captured anew, with one warning. A learning rate that a schedule moves
            should be a tensor: ``AdamW(..., lr=torch.tensor(1e-3, device="cuda"), capturable=True)``.
        device: where the model is.
        eager_calls: calls (>= 1) of each key that run before it is captured, on the stream that will capture it.
            Default 3.

    Absent tasks: the mapping that ``step`` hands to the balancer must have the same tasks in every call of one key.
    State: that of the balancer and the optimizer, complete after every call; after ``load_state_dict`` go on as usual.
    Where you give parameters other memory by hand (``.data``, ``model.to()``), call ``forget()``.
    Cost: for each key the memory of one step, in one pool that all share; a copy of the batch and of what is returned.
    Several ranks, float16 with a GradScaler, and methods that solve or draw on the host are refused.

    Raises:
        InvalidArgumentError: the balancer or the optimizer cannot be captured, or there is no CUDA device.
        CaptureError: something in ``step`` cannot be captured.

    Example::

        def step(inputs, targets):
            features = model.trunk(inputs)
            losses = {task: criterion(head(features), targets[task]) for task, head in model.heads.items()}
            loss = balancer(losses, shared_params=shared)
            loss.backward()
            optimizer.step()
            return loss

        graphed = GraphedStep(step, balancer, optimizer)
        for inputs, targets in batches:
            loss = graphed(inputs, targets)

    Source: "Whole-network capture" in PyTorch's notes on CUDA semantics: warm-up and capture on one side stream,
    gradients set to None before it.
    """

    def __init__(
        self,
        step: Callable[..., Part | None],
        balancer: Balancer,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device | str = "cuda",
        eager_calls: int = 3,
    ) -> None:
        self.step = step
        self.balancer = balancer
        self.optimizer = optimizer
        self.eager_calls = integer(eager_calls, "eager_calls", 1)
        _require_capturable(balancer, optimizer)
        self.device = _cuda_device(device)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Key, _Graph] = {}
        self._ran: Counter[Key] = Counter()
        self._batches: dict[Key, list[Part]] = {}
        self._constants: Key = ()
        self._warned = False
        optimizer.register_load_state_dict_post_hook(
            lambda _: self.forget()
        )  # its state is in new memory then

    def __call__(self, *batch: Part) -> Part | None:
        """Take one step and return what ``step`` returns, detached, in memory of its own."""
        self._check_call()
        with torch.cuda.device(self.device), self._aside():
            shapes = tuple(_shapes(part) for part in batch)
            inputs = self._fill(shapes, batch)
            key = (self.balancer.phase(), shapes)
            graph = self._graphs.get(key)
            if graph is None and self._ran[key] < self.eager_calls:
                self._ran[key] += 1
                return self._run_eagerly(inputs)
            if graph is None:
                graph = self._graphs[key] = self._capture(inputs)
            graph.replay(self.balancer)
            return _mapped(torch.clone, graph.outputs)

    def forget(self) -> None:
        """Drop the graphs; the next calls run eagerly and are captured anew.

        Done here where settings of the optimizer change, and where its state or that of the balancer moves to other
        memory. Call it where you move or replace something else that the step reads.
        """
        if self._graphs:
            torch.cuda.synchronize(self.device)  # one may still be running
        self._graphs.clear()
        self._ran.clear()

    def _check_call(self) -> None:
        """Refuse what would be captured wrongly, and drop graphs whose constants have changed."""
        if not (self.balancer.training and torch.is_grad_enabled()):
            raise InvalidArgumentError(
                "GraphedStep takes training steps, but the balancer is in eval(), or gradients are disabled; "
                "evaluate with the model itself"
            )
        if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
            raise InvalidArgumentError(
                "GraphedStep was called within autocast, whose cache would keep casts of old weights; enter autocast "
                "inside the step"
            )
        constants = (_settings(self.optimizer), tuple(t.data_ptr() for t in _tensors(self.balancer)))
        if constants == self._constants:
            return
        if self._graphs and not self._warned and constants[0] != self._constants[0]:
            self._warned = True
            warnings.warn(
                "GraphedStep: a setting of the optimizer changed, so the graphs were dropped and are captured anew; "
                "give it a learning rate that is a tensor to keep them",
                RecapturedWarning,
                stacklevel=3,
            )
        self.forget()
        self._constants = constants

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Go on in the stream of this step, after what the current one has in hand, which then waits for it."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def _fill(self, shapes: Key, batch: tuple[Part, ...]) -> list[Part]:
        """Copy the batch to where the graphs of its shapes read it."""
        inputs = self._batches.get(shapes)
        if inputs is None:
            inputs = [_mapped(lambda t: torch.empty_like(t, device=self.device), part) for part in batch]
            self._batches[shapes] = inputs
        for kept, part in zip(inputs, batch, strict=True):
            for target, given in zip(_leaves(kept), _leaves(part), strict=True):
                target.copy_(given.detach(), non_blocking=True)
        return inputs

    def _run_eagerly(self, inputs: list[Part]) -> Part | None:
        before = self.balancer.host_counters()
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():  # torch's advice for an optimizer that is never captured
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            outputs = _mapped(Tensor.detach, self.step(*inputs))
        _require_one_call(self.balancer.counters_since(before)["calls"])
        return outputs

    def _capture(self, inputs: list[Part]) -> _Graph:
        """Record what a call issues, without running it; the host counters are as before."""
        if obstacle := self.balancer.obstacle_to_graphs():
            raise _refusal(self.balancer, obstacle)
        before = self.balancer.host_counters()
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a DataLoader's thread that pins memory meanwhile does no harm.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with recording:
                outputs = _mapped(Tensor.detach, self.step(*inputs))
        except RuntimeError as error:
            self._pool = (
                torch.cuda.graph_pool_handle()
            )  # the old one may still think that it is being captured
            first = error.__context__ or error  # to end a capture that has failed is an error of its own
            if isinstance(first, MtlBalanceError):
                raise first from None
            raise CaptureError(
                f"the step could not be captured in a CUDA graph: {str(first).splitlines()[0]}. Nothing in it may wait "
                "for the device (.item(), print, an if on a tensor, indexing by a mask, GradScaler, AveragedModel), "
                "and no earlier loss may be kept with its graph; torch.cuda.set_sync_debug_mode('error') around the "
                "step itself finds the line"
            ) from error
        finally:
            moves = self.balancer.counters_since(before)
            self.balancer.move_counters({name: -move for name, move in moves.items()})
        _require_one_call(moves["calls"])
        gradients = [(p, p.grad) for group in self.optimizer.param_groups for p in group["params"]]
        return _Graph(graph, moves, outputs, gradients)


@dataclass(frozen=True)
class _Graph:
    """What a call of one key issues.

    Args:
        graph: the kernels.
        moves: what the call adds to each of the balancer's host counters.
        outputs: what the step returned, overwritten by every replay.
        gradients: each parameter with its gradient in this graph; kept, as the graph writes there.
    """

    graph: torch.cuda.CUDAGraph
    moves: Mapping[str, int]
    outputs: Part | None
    gradients: list[tuple[Tensor, Tensor | None]]

    def replay(self, balancer: Balancer) -> None:
        self.graph.replay()
        balancer.move_counters(self.moves)
        for parameter, gradient in self.gradients:
            parameter.grad = gradient


def _require_capturable(balancer: Balancer, optimizer: torch.optim.Optimizer) -> None:
    if obstacle := balancer.obstacle_to_graphs():
        raise _refusal(balancer, obstacle)
    if active_ranks(balancer.process_group) is not None:
        raise InvalidArgumentError(
            "GraphedStep captures one rank's step, but torch.distributed has several; call the step itself"
        )
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        raise InvalidArgumentError(
            f"{type(optimizer).__name__} counts its steps on the host, where a graph does not; build it with "
            "capturable=True"
        )
    for name, value in (item for group in optimizer.param_groups for item in group.items()):
        if isinstance(value, Tensor) and value.device.type != "cuda":
            raise InvalidArgumentError(
                f"{name!r} of {type(optimizer).__name__} is a tensor on {value.device}, which a graph would read once; "
                "make it one on the GPU"
            )


def _refusal(balancer: Balancer, obstacle: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"a step with {balancer.get_name()} cannot be captured in a CUDA graph: {obstacle}; call the step itself, or "
        "choose a method that stays on the device, such as GABALoss"
    )


def _require_one_call(calls: int) -> None:
    if calls != 1:
        raise InvalidArgumentError(
            f"the step of a GraphedStep must call its balancer once; this one called it {calls} times"
        )


def _cuda_device(name: torch.device | str) -> torch.device:
    device = torch.device(name)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise InvalidArgumentError(
            f"CUDA graphs need a CUDA device; device is {str(name)!r}, and this torch "
            f"{'has one' if torch.cuda.is_available() else 'has none'}; call the step itself"
        )
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _settings(optimizer: torch.optim.Optimizer) -> Key:
    """Return what of an optimizer's groups is a constant of a graph; a tensor is one by where it is."""
    return tuple(
        (name, value.data_ptr() if isinstance(value, Tensor) else value)
        for group in optimizer.param_groups
        for name, value in [*group.items(), ("size", len(group["params"]))]
        if name != "params"
    )


def _tensors(balancer: Balancer) -> Iterator[Tensor]:
    yield from balancer.parameters()
    yield from balancer.buffers()


def _leaves(part: Part) -> list[Tensor]:
    tensors = list(part.values()) if isinstance(part, Mapping) else [part]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise InvalidArgumentError(
                "what a GraphedStep is given, and what its step returns, are tensors or mappings of tensors by name; "
                f"got {type(tensor).__name__}"
            )
    return tensors


def _shapes(part: Part) -> Key:
    names = tuple(part) if isinstance(part, Mapping) else ()
    return (names, *((tensor.shape, tensor.dtype) for tensor in _leaves(part)))


@overload
def _mapped(change: Callable[[Tensor], Tensor], part: Part) -> Part: ...
@overload
def _mapped(change: Callable[[Tensor], Tensor], part: Part | None) -> Part | None: ...
def _mapped(change: Callable[[Tensor], Tensor], part: Part | None) -> Part | None:
    if part is None:
        return None
    changed = [change(tensor) for tensor in _leaves(part)]
    return dict(zip(part, changed, strict=True)) if isinstance(part, Mapping) else changed[0]
