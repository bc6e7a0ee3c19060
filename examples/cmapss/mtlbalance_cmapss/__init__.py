"""C-MAPSS for mtlbalance: the ``cmapss`` dataset and the ``cnn-bilstm-attention`` backbone."""

from __future__ import annotations

from mtlbalance.plugins import BackboneRegistration, DatasetRegistration, hookimpl

from .config import CmapssConfig, CnnBiLstmAttentionConfig, tasks_of

__version__ = "0.1.0"


@hookimpl
def register_datasets() -> list[DatasetRegistration]:
    """Bring the ``cmapss`` dataset."""
    return [
        DatasetRegistration(
            name="cmapss",
            summary="NASA C-MAPSS turbofan engines: remaining useful life and health state.",
            config=CmapssConfig,
            build=f"{__name__}.dataset:build",
            tasks=tasks_of,
        )
    ]


@hookimpl
def register_backbones() -> list[BackboneRegistration]:
    """Bring the ``cnn-bilstm-attention`` backbone."""
    return [
        BackboneRegistration(
            name="cnn-bilstm-attention",
            summary="CNN, bidirectional LSTM and attention over time steps (3.5 M parameters by default).",
            config=CnnBiLstmAttentionConfig,
            build=f"{__name__}.backbone:build",
        )
    ]
