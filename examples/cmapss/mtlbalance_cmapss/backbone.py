"""The study's network: convolutions, a bidirectional LSTM, attention at the last time step, a funnel."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor, nn

from mtlbalance.errors import ConfigError
from mtlbalance.slots import InputSpec, TaskSpec

from .config import CnnBiLstmAttentionConfig

KERNEL_SIZE = 3


def build(
    config: CnnBiLstmAttentionConfig, inputs: InputSpec, tasks: Sequence[TaskSpec]
) -> CnnBiLstmAttention:
    """Build the network for these inputs and tasks.

    Raises:
        ConfigError: the inputs are not (time steps, features).
    """
    if len(inputs.shape) != 2:
        raise ConfigError(
            "backbone 'cnn-bilstm-attention' needs inputs of shape (time steps, features), but the dataset "
            f"gives {inputs.shape}"
        )
    return CnnBiLstmAttention(config, num_features=inputs.shape[1], tasks=tasks)


class CnnBiLstmAttention(nn.Module):
    """A shared trunk and one head for each task.

    Args:
        config: sizes and switches.
        num_features: features of one time step, F.
        tasks: each gets a head by its kind.

    Shapes:
        inputs (B, T, F) -> {task: (B,) for one regression output, else (B, outputs)}
    """

    def __init__(
        self, config: CnnBiLstmAttentionConfig, num_features: int, tasks: Sequence[TaskSpec]
    ) -> None:
        super().__init__()
        self.trunk = Trunk(config, num_features)
        self.heads = nn.ModuleDict({task.name: make_head(config, task) for task in tasks})

    def forward(self, inputs: Tensor) -> Mapping[str, Tensor]:
        """Return the prediction of each task."""
        features = self.trunk(inputs)
        return {name: head(features) for name, head in self.heads.items()}


class Trunk(nn.Module):
    """Inputs (B, T, F) to shared features (B, fc_dims[-1])."""

    def __init__(self, config: CnnBiLstmAttentionConfig, num_features: int) -> None:
        super().__init__()
        self.cnn = make_cnn(config, num_features)
        self.lstm = nn.LSTM(
            config.cnn_channels[-1],
            config.hidden_size,
            num_layers=config.num_lstm_layers,
            # torch applies it between layers, and warns where there is nothing between.
            dropout=config.dropout if config.num_lstm_layers > 1 else 0.0,
            bidirectional=True,
            batch_first=True,
        )
        width = 2 * config.hidden_size
        self.attention = (
            LastStepAttention(
                width,
                config.num_attention_heads,
                dropout=config.attention_dropout,
                use_residual=config.use_residual,
            )
            if config.use_attention
            else LastStep()
        )
        self.funnel = make_funnel(config, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the shared features."""
        steps = self.cnn(inputs.transpose(1, 2)).transpose(1, 2)
        steps, _ = self.lstm(steps)
        features: Tensor = self.funnel(self.attention(steps))
        return features


class LastStepAttention(nn.Module):
    """Self-attention followed by a layer norm, computed for the last time step only.

    Only that step reaches the funnel, so only it asks a query: the same numbers and parameters as
    full self-attention, for 1/T of the scores.
    """

    def __init__(self, width: int, num_heads: int, *, dropout: float, use_residual: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.use_residual = use_residual

    def forward(self, steps: Tensor) -> Tensor:
        """Return (B, width) from (B, T, width)."""
        last = steps[:, -1:]
        attended, _ = self.attention(last, steps, steps, need_weights=False)
        attended = self.dropout(attended)
        normed: Tensor = self.norm(last + attended if self.use_residual else attended)
        return normed.squeeze(1)


class LastStep(nn.Module):
    """What stands in for the attention where it is switched off."""

    def forward(self, steps: Tensor) -> Tensor:
        """Return (B, width) from (B, T, width)."""
        return steps[:, -1]


class SqueezeLast(nn.Module):
    """(B, 1) to (B,)."""

    def forward(self, values: Tensor) -> Tensor:
        """Drop the last dimension."""
        return values.squeeze(-1)


def make_cnn(config: CnnBiLstmAttentionConfig, num_features: int) -> nn.Sequential:
    """Convolutions over time that keep the number of steps; half the dropout after each."""
    layers: list[nn.Module] = []
    for channels_in, channels_out in pairwise((num_features, *config.cnn_channels)):
        layers += [
            nn.Conv1d(channels_in, channels_out, KERNEL_SIZE, padding=KERNEL_SIZE // 2),
            nn.BatchNorm1d(channels_out),
            nn.ReLU(),
            nn.Dropout(config.dropout / 2),
        ]
    return nn.Sequential(*layers)


def make_funnel(config: CnnBiLstmAttentionConfig, width: int) -> nn.Sequential:
    """Linear, ReLU and dropout, ever narrower."""
    dropout = config.dropout if config.funnel_dropout is None else config.funnel_dropout
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise((width, *config.fc_dims)):
        layers += [nn.Linear(width_in, width_out), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def make_head(config: CnnBiLstmAttentionConfig, task: TaskSpec) -> nn.Sequential:
    """Build a head by the task's kind: hidden layers with ReLU, then the outputs.

    A classification head ends in logits. A regression head ends linearly, but for the task ``rul``
    in ``rul_activation``: life is not negative. Its output bias starts at ``rul_initial``, because a
    ReLU whose input starts below zero for every sample would get no gradient and stay at zero.
    """
    is_regression = task.kind == "regression"
    hidden = config.regression_head_dims if is_regression else config.classification_head_dims
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (width_in, width_out) in enumerate(pairwise((config.fc_dims[-1], *hidden))):
        layers[f"hidden_{index}"] = nn.Linear(width_in, width_out)
        layers[f"relu_{index}"] = nn.ReLU()
    output = nn.Linear((config.fc_dims[-1], *hidden)[-1], task.outputs)
    layers["output"] = output
    if is_regression and task.name == "rul":
        nn.init.constant_(output.bias, config.rul_initial)
        if config.rul_activation != "identity":
            layers["activation"] = nn.ReLU() if config.rul_activation == "relu" else nn.Softplus()
    if is_regression and task.outputs == 1:
        layers["squeeze"] = SqueezeLast()
    return nn.Sequential(layers)
