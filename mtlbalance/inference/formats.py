"""The formats of an exported model: from a model to a file's bytes, and from those to something that predicts."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, Literal, TypeAlias, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from mtlbalance.errors import ExportError, MissingExtraError
from mtlbalance.inference.parity import Predictor
from mtlbalance.training.model import MultiTaskModel

Format: TypeAlias = Literal["safetensors", "pt2", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
MANIFEST = "mtlbalance"  # the name of the manifest among a file's metadata
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TRACED_BATCH = 2


def check_installed(file_format: Format) -> None:
    """Raise MissingExtraError if the packages that a format needs are not installed."""
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if file_format == "onnx" and missing:
        raise MissingExtraError(
            f"the format 'onnx' needs {', '.join(missing)}, which is not installed; pip install 'mtlbalance[onnx]'"
        )


def export_safetensors(model: MultiTaskModel, manifest: Mapping[str, Any]) -> bytes:
    """Return the weights by name, and the manifest as the file's metadata; the same bytes for the same model."""
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    return safetensors.torch.save(weights, metadata={MANIFEST: json.dumps(manifest)})


def export_pt2(model: MultiTaskModel, manifest: Mapping[str, Any], example: Tensor) -> bytes:
    """Return the model as an ``ExportedProgram``, which torch loads without its code."""
    file = io.BytesIO()
    program = _trace(model, example)
    with _quiet():
        torch.export.save(program, file, extra_files={f"{MANIFEST}.json": json.dumps(manifest)})
    return file.getvalue()


def export_onnx(
    model: MultiTaskModel, manifest: Mapping[str, Any], example: Tensor, tasks: Sequence[str]
) -> bytes:
    """Return the model as ONNX: one input ``inputs``, one output a task, the manifest in the metadata."""
    program = _trace(model, example)
    with _quiet(), _blamed("cannot be translated to ONNX"):
        exported = torch.onnx.export(
            program, (example,), dynamo=True, verbose=False, input_names=["inputs"], output_names=list(tasks),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
        assert exported is not None
        exported.model.metadata_props[MANIFEST] = json.dumps(manifest)
        content: bytes = exported.model_proto.SerializeToString()
    return content


def load_safetensors(content: bytes, build: Callable[[dict[str, Tensor]], nn.Module]) -> Predictor:
    """Return a model that ``build`` makes with the weights of a file."""
    model = build(safetensors.torch.load(content))
    return _without_gradients(model)


def load_pt2(content: bytes) -> Predictor:
    """Return the program in a file."""
    with _quiet(), _blamed("cannot be loaded again"):
        module = torch.export.load(io.BytesIO(content)).module()
    return _without_gradients(module)


def load_onnx(content: bytes, tasks: Sequence[str]) -> Predictor:
    """Return a session of ONNX Runtime on the CPU."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    with _blamed("cannot be loaded again"):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(inputs: Tensor) -> dict[str, Tensor]:
        outputs = session.run(list(tasks), {"inputs": inputs.numpy()})
        return {task: torch.from_numpy(output) for task, output in zip(tasks, outputs, strict=True)}

    return run


def _trace(model: MultiTaskModel, example: Tensor) -> torch.export.ExportedProgram:
    # Without strict, Python runs as it is, so more networks can be traced. A copy, because tracing a recurrent
    # layer touches it.
    with _quiet(), _blamed("cannot be traced by torch.export"):
        return torch.export.export(
            copy.deepcopy(model), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )


def example_of(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return what to trace with: zeros, because an exported program keeps its example and data may be private."""
    return torch.zeros(_TRACED_BATCH, *shape, dtype=dtype)


def _without_gradients(module: nn.Module) -> Predictor:
    def run(inputs: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs: dict[str, Tensor] = module(inputs)
        return outputs

    return run


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Turn whatever the exporter raises into an error for the user."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2])[:500]
        raise ExportError(
            f"the model {what}: {type(error).__name__}: {reason}\nA backbone can be exported if its forward pass does "
            "not branch on the values of tensors, nor fix the batch size; 'safetensors' needs neither"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporters say of themselves: whether the result is right is measured, not read there."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # a failed trace prints its graph
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
