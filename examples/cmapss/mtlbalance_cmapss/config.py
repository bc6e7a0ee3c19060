"""The options of the ``cmapss`` dataset and of the ``cnn-bilstm-attention`` backbone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from mtlbalance.plugins import PluginConfig, TaskSpec

Subset: TypeAlias = Literal["FD001", "FD002", "FD003", "FD004"]
PadMode: TypeAlias = Literal["short", "all"]
Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]

STUDY_RUL_CAP = 125.0  # cycles; published figures are for labels with this cap
SUBSETS: tuple[Subset, ...] = ("FD001", "FD002", "FD003", "FD004")
MULTI_CONDITION_SUBSETS: tuple[Subset, ...] = ("FD002", "FD004")


class CmapssConfig(PluginConfig):
    """Options of ``[dataset] name = "cmapss"``."""

    places: ClassVar[frozenset[str]] = frozenset({"data_dir"})

    subset: Subset = Field("FD001", description="FD002 and FD004 have six operating conditions")
    protocol: Literal["paper", "honest", "window-split"] = Field(
        "paper",
        description="paper: the test set picks the best epoch; honest: held-out engines do; "
        "window-split: held-out windows of training engines do (a leak, for demonstration)",
    )
    source: Literal["auto", "nasa", "simulated"] = Field(
        "auto", description="auto: the NASA files where they are found, else a simulated fleet"
    )
    data_dir: Path | None = Field(
        None, description="folder of the NASA files; else MTLBALANCE_CMAPSS_DIR, else the cache folder"
    )
    window: int = Field(30, ge=1, le=1000, description="cycles in one window")
    rul_cap: float = Field(
        STUDY_RUL_CAP,
        gt=0,
        description="training labels never exceed this many cycles; "
        "target_cap of amnl and grace is the same quantity: change both together",
    )
    cap_test_labels: bool = Field(True, description="cap the test (and validation) labels too")
    health_thresholds: tuple[float, ...] = Field(
        (80.0, 30.0),
        min_length=1,
        description="falling: class 0 is above the first, the last class at or below the last",
    )
    pad: PadMode = Field(
        "short",
        description="short: pad only engines shorter than a window; all: a window for every row",
    )
    per_condition: Literal["auto"] | bool = Field(
        "auto", description="scale sensors within each operating condition; auto: FD002 and FD004 only"
    )
    scale_settings_globally: bool = Field(
        True, description="scale the three settings over all conditions, even where sensors are not"
    )
    validation_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of training engines (or windows) that is held out"
    )
    split_seed: int = Field(0, ge=0, description="which engines are held out, and where they are cut")
    simulated_engines: int = Field(100, ge=4, le=10_000, description="engines in each simulated file")
    simulated_seed: int = Field(0, ge=0, description="seed of the simulated fleet")

    @field_validator("data_dir", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _thresholds_fall_below_the_cap(self) -> Self:
        thresholds = self.health_thresholds
        if any(high <= low for high, low in pairwise(thresholds)) or thresholds[-1] <= 0:
            raise ValueError(f"health_thresholds must be positive and falling, got {list(thresholds)}")
        if thresholds[0] >= self.rul_cap:
            raise ValueError(
                f"health_thresholds starts at {thresholds[0]:g}, not below rul_cap = {self.rul_cap:g}: "
                "health class 0 would be empty"
            )
        return self

    @property
    def scales_per_condition(self) -> bool:
        """Whether sensors are scaled within each operating condition."""
        if self.per_condition == "auto":
            return self.subset in MULTI_CONDITION_SUBSETS
        return self.per_condition


def tasks_of(config: CmapssConfig) -> tuple[TaskSpec, TaskSpec]:
    """Return the two tasks: remaining useful life in cycles, and the health class."""
    return (
        TaskSpec("rul", "regression", loss="mse", outputs=1),
        TaskSpec(
            "health",
            "classification",
            loss="cross_entropy",
            outputs=len(config.health_thresholds) + 1,
            metrics=("accuracy", "f1"),
        ),
    )


class CnnBiLstmAttentionConfig(PluginConfig):
    """Options of ``[backbone] name = "cnn-bilstm-attention"``; the defaults are the study's sizes."""

    hidden_size: int = Field(256, ge=1, description="LSTM units per direction")
    cnn_channels: tuple[Positive, ...] = Field(
        (64, 128, 64), min_length=1, description="output channels of each convolution"
    )
    num_lstm_layers: int = Field(2, ge=1, description="stacked bidirectional LSTM layers")
    num_attention_heads: int = Field(8, ge=1, description="must divide 2 x hidden_size")
    fc_dims: tuple[Positive, ...] = Field(
        (256, 64, 32), min_length=1, description="widths of the funnel; the last feeds every head"
    )
    dropout: Probability = Field(0.3, description="between LSTM layers and in the funnel; half in the CNN")
    attention_dropout: Probability = Field(0.1, description="on attention weights and on attention's output")
    funnel_dropout: Probability | None = Field(
        None, description="dropout in the funnel; none: as dropout. 0 helps the regression head in evaluation"
    )
    use_attention: bool = Field(True, description="false: the last LSTM step goes straight to the funnel")
    use_residual: bool = Field(True, description="add the last LSTM step to attention's output")
    regression_head_dims: tuple[Positive, ...] = Field(
        (64, 32, 16), description="hidden widths of regression heads"
    )
    classification_head_dims: tuple[Positive, ...] = Field(
        (32, 16), description="hidden widths of classification heads"
    )
    rul_activation: Literal["relu", "softplus", "identity"] = Field(
        "relu", description="on the output of the task 'rul'; other regression heads are linear"
    )
    rul_initial: float = Field(
        62.5,
        gt=0,
        description="output bias at the start, in cycles: half the cap, so that no ReLU starts dead",
    )

    @model_validator(mode="after")
    def _attention_heads_divide(self) -> Self:
        if self.use_attention and 2 * self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} does not divide "
                f"2 x hidden_size = {2 * self.hidden_size}"
            )
        return self
