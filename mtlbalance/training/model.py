"""The model that is trained: a shared trunk and one head a task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mtlbalance.errors import PluginError
from mtlbalance.slots import TaskSpec


class MultiTaskModel(nn.Module):
    """``model(inputs) -> {task: prediction}``.

    Args:
        trunk: inputs -> features; its parameters are the shared ones.
        heads: one module a task, features -> prediction.
        tasks: a regression head of width 1 predicts (B,), any other head (B, outputs).
    """

    def __init__(self, trunk: nn.Module, heads: nn.ModuleDict, tasks: Sequence[TaskSpec]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads
        self._scalar = {task.name: task.kind == "regression" and task.outputs == 1 for task in tasks}

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return every task's prediction."""
        features = self.trunk(inputs)
        predictions: dict[str, Tensor] = {}
        for name, scalar in self._scalar.items():
            prediction = self.heads[name](features)
            predictions[name] = prediction.squeeze(-1) if scalar and prediction.dim() > 1 else prediction
        return predictions


def build_model(backbone: nn.Module, tasks: Sequence[TaskSpec], *, name: str = "backbone") -> MultiTaskModel:
    """Put a backbone's trunk and heads together; default heads are one linear layer a task.

    Args:
        backbone: has ``trunk`` and either ``heads`` (``nn.ModuleDict`` by task) or ``feature_size``.
        tasks: the tasks to predict.
        name: the backbone's name, for messages.

    Raises:
        PluginError: a part is missing, parameters lie outside trunk and heads, none can be trained, or there is
            state that is no tensor.
    """
    trunk = getattr(backbone, "trunk", None)
    if not isinstance(trunk, nn.Module):
        raise PluginError(f"the backbone {name!r} has no module 'trunk' (inputs -> features)")
    heads = getattr(backbone, "heads", None)
    if heads is None:
        width = getattr(backbone, "feature_size", None)
        if not isinstance(width, int):
            raise PluginError(
                f"the backbone {name!r} has neither 'heads' (nn.ModuleDict by task) nor 'feature_size' (int)"
            )
        heads = nn.ModuleDict({task.name: nn.Linear(width, task.outputs) for task in tasks})
    missing = [task.name for task in tasks if task.name not in heads]
    if missing:
        raise PluginError(f"the backbone {name!r} has no head for {', '.join(map(repr, missing))}")
    model = MultiTaskModel(trunk, heads, tasks)
    held = {id(parameter) for parameter in model.parameters()}
    stray = [key for key, parameter in backbone.named_parameters() if id(parameter) not in held]
    if stray:
        raise PluginError(
            f"the backbone {name!r} has parameters outside trunk and heads, which would never be trained: "
            f"{', '.join(stray[:5])}"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PluginError(f"the backbone {name!r} has no trainable parameters: nothing could be learned")
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise PluginError(
                f"the backbone {name!r} keeps state that is no tensor ({key}), which a file of weights cannot hold; "
                "register it as a buffer"
            )
    return model


def parameter_counts(model: MultiTaskModel) -> dict[str, int]:
    """Return the numbers of parameters: ``total``, ``trainable``, ``shared`` (the trunk) and ``heads``."""
    shared = sum(parameter.numel() for parameter in model.trunk.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"total": total, "trainable": trainable, "shared": shared, "heads": total - shared}
