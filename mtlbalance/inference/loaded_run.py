"""``load_run``: a run's folder in, its model ready to predict out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mtlbalance.errors import DataError, RunFolderError, did_you_mean
from mtlbalance.inference.chunks import Chunk, array_chunks, dataset_chunks, read_array
from mtlbalance.inference.predicting import PredictedChunk, predict_chunks, with_probabilities
from mtlbalance.inference.run_files import Weights, check_data, read_config, read_results, read_weights
from mtlbalance.plugins.references import build_plugin
from mtlbalance.slots import InputSpec, MultiTaskData, Sample, TaskSpec
from mtlbalance.training.data import build_data, describe_inputs, named_sets
from mtlbalance.training.devices import resolve_device
from mtlbalance.training.fingerprint import fingerprint
from mtlbalance.training.model import MultiTaskModel, build_model
from mtlbalance.training.seeding import reproducible

if TYPE_CHECKING:
    from mtlbalance.config import RunConfig

DEFAULT_BATCH_SIZE = 1024


def load_run(path: Path | str, *, weights: Weights = "ema", overrides: Sequence[str] = ()) -> LoadedRun:
    """Load a finished run to predict with its model.

    The folder is only read. The run's data is not needed, unless something asks for it (``data``).

    Args:
        path: the run's folder.
        weights: ``"ema"``: the averaged weights of the best epoch (``model.safetensors``; ``metrics`` in
            ``results.json`` are theirs). ``"last"``: the averaged weights of the last epoch (``final_metrics``).
            ``"live"``: the weights after the last step, without averaging.
        overrides: ``key=value`` for what does not decide the result, such as ``"dataset.data_dir=/data"``.

    Raises:
        RunFolderError: the folder is no run's, the run has not finished, or a file is damaged or of another version.
        InvalidConfigError: the run's config cannot be read here, for example because a plugin is missing.

    Example:
        >>> run = load_run("runs/toy/seed_42")  # doctest: +SKIP
        >>> run.predict(inputs)["large"]  # doctest: +SKIP
        tensor([12.1, -3.4])
    """
    folder = Path(path)
    if weights not in ("ema", "last", "live"):
        raise RunFolderError(f"unknown weights {weights!r}; use 'ema', 'last' or 'live'")
    results = read_results(folder)
    config = read_config(folder, results, overrides)
    return LoadedRun(folder, config, results, weights)


class LoadedRun:
    """A finished run: its config and results, and its model with the chosen weights; made by ``load_run``.

    Attributes:
        path: the run's folder.
        config: the config that it was trained with.
        results: the content of ``results.json``.
        weights: which weights ``model`` has: ``"ema"``, ``"last"`` or ``"live"``.
        tasks: the tasks.
        inputs: the shape of one input, and the names along its last dimension where they are known.
        input_dtype: the numbers that the model takes.
        model: ``model(inputs) -> {task: prediction}``, in evaluation mode, on the CPU at first; logits for a
            classification.
    """

    def __init__(self, path: Path, config: RunConfig, results: dict[str, Any], weights: Weights) -> None:
        self.path = path
        self.config = config
        self.results = results
        self.weights = weights
        self.tasks: tuple[TaskSpec, ...] = config.tasks
        # A run of a version that did not record its inputs needs its data to say what they are.
        recorded = results.get("inputs") or describe_inputs(self.data)
        self.inputs = InputSpec(
            tuple(recorded["shape"]), recorded["description"], tuple(recorded["feature_names"])
        )
        self.input_dtype: torch.dtype = getattr(torch, recorded["dtype"])
        self.model = self.build_model(read_weights(path, results, weights))

    def predict(
        self,
        inputs: Tensor | npt.ArrayLike | Dataset[Sample],
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        device: str | None = None,
        logits: bool = False,
    ) -> dict[str, Tensor]:
        """Return every task's prediction for each input, on the CPU.

        The inputs go through the model ``batch_size`` at a time, so that memory holds one such chunk of them beside
        the predictions; how many never changes the result by more than rounding.

        Args:
            inputs: (N, *shape) as a tensor, an array or nested lists, scaled as the run's dataset gives them; or a
                map-style dataset such as ``run.split("test")``.
            batch_size: inputs a chunk, at least 1.
            device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"mps"``: the model is moved there and stays;
                None: where it is.
            logits: a classification's logits instead of its probabilities.

        Returns:
            task -> (N,) for a regression of one output, (N, outputs) for a wider one; (N, classes) of probabilities for
            a classification (a single logit gives the probability of class 1).

        Raises:
            DataError: the inputs do not have the shape that the model takes, or there are none.
            DeviceError: the device does not exist here.
            PredictionError: the model fails on them, or memory runs out.
        """
        chunks: Iterable[Chunk]
        if isinstance(inputs, Dataset):
            chunks = dataset_chunks(inputs, _positive(batch_size), name=self.config.dataset.name)
        else:
            array = read_array(inputs)
            chunks = array_chunks(array, self.inputs, _positive(batch_size), source="the inputs")
        parts = [chunk.outputs for chunk in self.predict_chunks(chunks, device=device, logits=logits)]
        return {task.name: torch.cat([part[task.name] for part in parts]) for task in self.tasks}

    def predict_chunks(
        self, chunks: Iterable[Chunk], *, device: str | None = None, logits: bool = False
    ) -> Iterator[PredictedChunk]:
        """Yield the predictions for one chunk after the other, as ``predict`` gives them; nothing is kept.

        Args:
            chunks: inputs, targets and meta, for example from ``mtlbalance.inference.chunks``.
            device: as for ``predict``.
            logits: as for ``predict``.
        """
        if device is not None:
            self.model.to(resolve_device(device, option="device"))
        for predicted in predict_chunks(self.model, chunks, self.inputs, self.input_dtype):
            yield predicted if logits else with_probabilities(predicted, self.tasks)

    @property
    def epoch(self) -> int:
        """The epoch, from 0, after which the weights were as they are."""
        return int(self.results["best_epoch"] if self.weights == "ema" else self.results["epochs_run"] - 1)

    @cached_property
    def data(self) -> MultiTaskData:
        """The run's data, built anew by its plugin and compared with what the run was trained on.

        Raises:
            DataError, PluginError: it cannot be built here.
            RunFolderError: it is not the data that the run was trained on.
        """
        run = self.config.run
        with reproducible(run.seed, deterministic=run.deterministic):
            data = build_data(self.config)
            check_data(self.path, fingerprint(data))
        return data

    def split(self, which: str) -> Dataset[Sample]:
        """Return a set of the run's data.

        Args:
            which: ``"training"``, ``"validation"`` or ``"test"``.

        Raises:
            DataError: the run's data has no such set.
        """
        sets = named_sets(self.data)
        if which not in sets:
            raise DataError(
                f"dataset {self.config.dataset.name!r} has no {which!r} set{did_you_mean(which, sets)}; it has "
                f"{', '.join(sets)}"
            )
        return sets[which]

    def build_model(self, weights: dict[str, Tensor]) -> MultiTaskModel:
        """Return a new model of the run's backbone with these weights, for evaluation, on the CPU.

        Raises:
            RunFolderError: the weights do not fit.
        """
        run, backbone = self.config.run, self.config.backbone
        with reproducible(run.seed, deterministic=run.deterministic):
            built: nn.Module = build_plugin(backbone.registration, backbone.options, self.inputs, self.tasks)
            model = build_model(built, self.tasks, name=backbone.name)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RunFolderError(
                f"the weights in {self.path} do not fit the backbone {backbone.name!r} as it is built here: {reason}"
            ) from error
        return model.eval().requires_grad_(requires_grad=False)


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, not {batch_size}")
    return batch_size
