"""From chunks of inputs to chunks of predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtlbalance.errors import DataError, MtlBalanceError, PredictionError
from mtlbalance.inference.chunks import Chunk, check_shape
from mtlbalance.plugins.importing import describe_failure
from mtlbalance.slots import InputSpec, TaskSpec
from mtlbalance.training.memory import is_out_of_memory
from mtlbalance.training.model import MultiTaskModel


class PredictedChunk(NamedTuple):
    """One chunk on the CPU: the model's outputs by task, targets where they are known, and meta."""

    outputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    meta: Mapping[str, Tensor]


def predict_chunks(
    model: MultiTaskModel, chunks: Iterable[Chunk], spec: InputSpec, dtype: torch.dtype
) -> Iterator[PredictedChunk]:
    """Yield what the model gives, logits for a classification.

    Args:
        model: put into evaluation mode.
        chunks: their inputs go to where the model is, and to ``dtype``.
        spec: the shape of one input.
        dtype: the numbers that the model takes.

    Raises:
        DataError: inputs of another shape.
        PredictionError: the model fails.
    """
    model.eval()
    device = next(model.parameters()).device
    done = 0
    for inputs, targets, meta in chunks:
        check_shape(tuple(inputs.shape), spec, source="the inputs")
        _check_whole_numbers(inputs, dtype, done)
        try:
            with torch.no_grad():
                outputs = {name: output.cpu() for name, output in model(inputs.to(device, dtype)).items()}
        except MtlBalanceError:
            raise
        except Exception as error:
            raise _failure(error, done, len(inputs)) from error
        done += len(inputs)
        yield PredictedChunk(outputs, targets, meta)


def with_probabilities(chunk: PredictedChunk, tasks: Sequence[TaskSpec]) -> PredictedChunk:
    """Return the chunk with the probabilities of the classifications in place of their logits."""
    return chunk._replace(
        outputs={
            task.name: probabilities(chunk.outputs[task.name])
            if task.kind == "classification"
            else chunk.outputs[task.name]
            for task in tasks
        }
    )


def probabilities(logits: Tensor) -> Tensor:
    """Return (N, classes) that sum to 1; a single logit gives the probability of class 1."""
    return logits.softmax(dim=-1) if logits.shape[-1] > 1 else logits.sigmoid()


def _check_whole_numbers(inputs: Tensor, dtype: torch.dtype, start: int) -> None:
    if dtype.is_floating_point or not inputs.is_floating_point():
        return
    whole = (inputs == inputs.round()).flatten(1).all(dim=1)
    if not whole.all():
        sample = start + int((~whole).nonzero()[0])
        raise DataError(f"the model takes whole numbers, but sample {sample} has others")


def _failure(error: Exception, start: int, count: int) -> PredictionError:
    where = f"samples {start} to {start + count - 1}"
    if is_out_of_memory(error):
        return PredictionError(f"out of memory while predicting {where}; lower the batch size from {count}")
    reason, place = describe_failure(error, "")
    at = f" (at {place})" if place else ""
    return PredictionError(f"the model failed on {where}: {reason}{at}")
