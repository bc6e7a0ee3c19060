"""The built-in ``mlp`` backbone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class MLP(nn.Module):
    """Fully connected layers on the flattened input; the heads are left to the trainer.

    Args:
        in_features: numbers in one input.
        hidden_sizes: width of each layer; the last one is ``feature_size``.
        dropout: after each layer, in [0, 1).
        activation: ``relu``, ``gelu``, ``silu`` or ``tanh``.
    """

    def __init__(
        self, in_features: int, hidden_sizes: Sequence[int], dropout: float = 0.0, activation: str = "relu"
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in zip((in_features, *hidden_sizes), hidden_sizes, strict=False):
            layers += [nn.Linear(width_in, width_out), _ACTIVATIONS[activation]()]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        self.trunk = nn.Sequential(*layers)
        self.feature_size = hidden_sizes[-1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features, (B, feature_size)."""
        features: Tensor = self.trunk(inputs)
        return features
