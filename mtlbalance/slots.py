"""What the three slots exchange: tasks, the description of the inputs, and the data of a run.

Nothing here imports torch when it is imported, so that ``mtlbalance validate`` and
``mtlbalance plugins list`` answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from torch.utils.data import Dataset

TaskKind: TypeAlias = Literal["regression", "classification"]
PerSampleLoss: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
Sample: TypeAlias = "tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]"
Evaluator: TypeAlias = (
    "Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, float]]"
)


@dataclass(frozen=True)
class TaskSpec:
    """One task: what its head gives, how it is scored and how it is learned.

    Args:
        name: unique among the tasks of a dataset; it becomes a column name in the run's files.
        kind: ``"regression"`` or ``"classification"``.
        loss: ``loss(prediction, target) -> (B,)``, one value a sample. A callable, the name of a
            built-in (``"mse"``, ``"l1"``, ``"huber"``, ``"cross_entropy"``), or ``"module:attribute"``.
        outputs: width of the head. A regression head of width 1 predicts ``(B,)``, any other head
            predicts ``(B, outputs)`` (logits for a classification).
        metrics: names of per-task metrics, reported as ``<task>_<metric>``: ``"rmse"``, ``"mae"``,
            ``"r2"``, ``"accuracy"``, ``"f1"`` (support-weighted).
    """

    name: str
    kind: TaskKind
    loss: str | PerSampleLoss
    outputs: int = 1
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class InputSpec:
    """The shape of one input, without the batch dimension, for the backbone to be built on.

    Args:
        shape: for example ``(30, 17)``: 30 time steps of 17 features; ``(8,)``: 8 features.
        description: one line for a person, such as ``"30 cycles x 17 features"``.
        feature_names: names along the last dimension, or empty.
    """

    shape: tuple[int, ...]
    description: str = ""
    feature_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class MultiTaskData:
    """What a dataset plugin's ``build`` returns.

    Each set is a map-style dataset whose items are ``(inputs, {task: target}, meta)``; an
    ``InMemoryDataset`` is batched by indexing its tensors on the device, any other goes through a
    ``DataLoader``. ``meta`` maps names to numbers that the evaluator needs, such as an engine's id.

    Args:
        train: the training set, shuffled by the trainer.
        validation: the set watched for the best epoch, the plateau and the early stop, or None to
            watch the test set. With a validation set, the test set is read once, at the end.
        test: the test set, never shuffled.
        tasks: as the registration says them for the same config.
        inputs: the description of one input.
        key_metric: the metric that decides which epoch is best.
        key_metric_mode: ``"min"`` or ``"max"``.
        evaluate: ``evaluate(predictions, targets, meta) -> {metric: value}`` over a whole set, in its
            order, for metrics beyond the tasks' own; all arguments map names to CPU tensors.
        protocol: how train, validation and test were made, for ``results.json``.
        data_source: where the numbers come from, such as ``"nasa"`` or ``"simulated"``.
        facts: anything else worth recording with the result (JSON scalars).
        notices: sentences that a user must see before and after the run.
        read_inputs: ``read_inputs(path)`` reads a file of the domain's own form and gives it, scaled as the
            training set was, as a set to predict on (``mtlbalance predict --input``): its samples need no
            targets, and ``meta`` says which is which. None: only files of finished inputs can be read.
    """

    train: Dataset[Sample]
    validation: Dataset[Sample] | None
    test: Dataset[Sample]
    tasks: tuple[TaskSpec, ...]
    inputs: InputSpec
    key_metric: str
    key_metric_mode: Literal["min", "max"] = "min"
    evaluate: Evaluator | None = None
    protocol: str = ""
    data_source: str = ""
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    read_inputs: Callable[[Path], Dataset[Sample]] | None = None
