"""``export_run``: a run's model as one file for other programs, checked against the model before it is written."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtlbalance import __version__
from mtlbalance.errors import ExportError, WriteError
from mtlbalance.inference.formats import (
    Format,
    check_installed,
    example_of,
    export_onnx,
    export_pt2,
    export_safetensors,
    load_onnx,
    load_pt2,
    load_safetensors,
)
from mtlbalance.inference.loaded_run import LoadedRun
from mtlbalance.inference.parity import BATCH_SIZES, Predictor, TaskParity, compare, real_inputs
from mtlbalance.inference.run_files import check_output
from mtlbalance.training import atomic
from mtlbalance.training.model import MultiTaskModel

MANIFEST_SCHEMA = 1
DEFAULT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Exported:
    """What ``export_run`` wrote.

    Args:
        path: the file.
        file_format: its format.
        num_bytes: its size.
        parity: for each task, the largest difference to the model and what was allowed.
        compared_on: which set of the run's data the inputs were from.
        batch_sizes: in which the two were compared.
        tolerance: see ``TaskParity.allowed``.
    """

    path: Path
    file_format: Format
    num_bytes: int
    parity: list[TaskParity]
    compared_on: str
    batch_sizes: tuple[int, ...]
    tolerance: float


def export_run(
    run: LoadedRun, file_format: Format, path: Path, *, tolerance: float = DEFAULT_TOLERANCE
) -> Exported:
    """Export the model of a run and check that the file gives the model's numbers.

    ``model(inputs) -> {task: prediction}`` with any batch size: logits for a classification. What was exported is
    loaded again and compared with the model on inputs of the run's validation set (or test set), one and several at
    a time; only a file that passed is written.

    Args:
        run: a loaded run.
        file_format: ``"safetensors"``: weights alone. ``"pt2"``: a program for ``torch.export.load``.
            ``"onnx"``: needs the extra ``mtlbalance[onnx]``.
        path: the file to write; its folder is made if need be.
        tolerance: what a difference may be, relative to the largest output of its task (or to 0.1).

    Raises:
        MissingExtraError: the packages of the format are not installed.
        ExportError: the model cannot be exported, or the file does not give its numbers; nothing is written.
        RunFolderError, DataError: ``path`` belongs to the run, or its data is not here to compare on.
    """
    check_installed(file_format)
    check_output(run.path, path)
    which = "test" if run.data.validation is None else "validation"
    inputs = real_inputs(run.split(which), run.input_dtype)
    model = copy.deepcopy(run.model).cpu().eval()
    content, exported = _export(run, model, file_format)

    def predict(batch: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs: dict[str, Tensor] = model(batch)
        return outputs

    parity = compare(predict, exported, inputs, [task.name for task in run.tasks], tolerance)
    broken = [
        f"{task.task}: {task.max_difference:.3g}, allowed {task.allowed:.3g}"
        for task in parity
        if not task.holds
    ]
    if broken:
        raise ExportError(
            f"the exported {file_format} differs from the model by more than is allowed ({'; '.join(broken)}), so "
            "nothing was written"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make the folder {path.parent}: {error.strerror or error}") from error
    atomic.write_bytes(path, content)
    return Exported(path, file_format, len(content), parity, which, BATCH_SIZES, tolerance)


def make_manifest(run: LoadedRun) -> dict[str, Any]:
    """Return what a file says of itself: the run, its config without names and places, inputs, tasks, outputs."""
    results = run.results
    return {
        "schema": MANIFEST_SCHEMA,
        "mtlbalance": __version__,
        "run": results["run"],
        "method": results.get("method_name", ""),
        "data_source": results.get("data_source", ""),
        "protocol": results.get("protocol", ""),
        "config_hash": results["config_hash"],
        "config": run.config.result_dict(),
        "weights": run.weights,
        "epoch": run.epoch,
        "inputs": {
            "shape": ["batch", *run.inputs.shape],
            "dtype": str(run.input_dtype).removeprefix("torch."),
            "description": run.inputs.description,
            "feature_names": list(run.inputs.feature_names),
        },
        "tasks": [
            {
                "name": task.name,
                "kind": task.kind,
                "outputs": task.outputs,
                "gives": "logits" if task.kind == "classification" else "values",
            }
            for task in run.tasks
        ],
        "notices": results.get("notices", []),
    }


def _export(run: LoadedRun, model: MultiTaskModel, file_format: Format) -> tuple[bytes, Predictor]:
    """Return a file's content, and what predicts with it."""
    manifest = make_manifest(run)
    if file_format == "safetensors":
        content = export_safetensors(model, manifest)
        return content, load_safetensors(content, run.build_model)
    example = example_of(run.inputs.shape, run.input_dtype)
    if file_format == "pt2":
        content = export_pt2(model, manifest, example)
        return content, load_pt2(content)
    tasks = [task.name for task in run.tasks]
    content = export_onnx(model, manifest, example, tasks)
    return content, load_onnx(content, tasks)
