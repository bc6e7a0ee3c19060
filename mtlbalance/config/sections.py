"""The sections of a run's config that belong to no plugin: ``[run]`` and ``[training]``."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Base of the fixed sections: unknown keys are errors, values cannot change, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(Section):
    """``[run]``: name, folder, device, signal and memory; only ``seed`` and ``deterministic`` decide the result."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        description="letters, digits, _ . and -; default: the config file's name",
    )
    seed: int = Field(42, ge=0, le=2**32 - 1, description="seeds every random generator")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto | cpu | cuda | cuda:N | mps"
    )
    output_dir: Path = Field(Path("runs"), description="relative to the current folder; ~ is the home folder")
    deterministic: bool = Field(True, description="ask torch for deterministic algorithms")
    preempt_signal: Literal["none", "USR1", "USR2"] = Field(
        "none", description="a signal that stops the run like SIGTERM, as SLURM's --signal sends it"
    )

    keep_freed_memory: bool = Field(
        False,
        description="Linux: keep freed memory for the next step instead of returning it; faster, holds more",
    )

    @field_validator("output_dir", mode="before")
    @classmethod
    def _a_folder_with_a_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not value.strip():
            raise ValueError('it is empty; "." is the current folder')
        return os.path.expanduser(value)  # noqa: PTH111  # pathlib's raises for an unknown user


class TrainingSection(Section):
    """``[training]``: the optimisation.

    The defaults are the study's, but for one: weight decay stays constant. The study lowers it to 5e-5 once
    epoch > 100, which is ``weight_decay_late = 5e-5``.
    """

    epochs: int = Field(500, ge=1, description="at most this many epochs")
    batch_size: int = Field(256, ge=1, description="samples a step")
    lr: float = Field(1e-3, gt=0, description="learning rate after warm-up")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's decoupled weight decay")
    weight_decay_late: float | None = Field(
        None, ge=0, description="weight decay from weight_decay_late_epoch on; none: constant"
    )
    weight_decay_late_epoch: int = Field(
        100, ge=0, description="the late weight decay holds once epoch (from 0) > this"
    )
    grad_clip: float = Field(1.0, ge=0, description="joint L2 norm of the model's gradients; 0: no clipping")
    warmup_epochs: int = Field(10, ge=0, description="epochs of linear learning-rate warm-up")
    warmup_start: float = Field(0.1, gt=0, le=1, description="first factor of the warm-up")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="weight EMA per step; 0: evaluate live weights")
    patience: int = Field(80, ge=1, description="epochs without improvement before the early stop")
    min_delta: float = Field(0.0, ge=0, description="smallest change that counts as an improvement")
    scheduler_factor: float = Field(0.5, gt=0, lt=1, description="learning-rate factor at a plateau")
    scheduler_patience: int = Field(30, ge=0, description="epochs without improvement before it")
    scheduler_min_lr: float = Field(5e-6, ge=0, description="the plateau schedule never goes below")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="bf16, fp16: autocast of forward and losses; fp16 with a gradient scaler"
    )
    matmul_precision: Literal["highest", "high", "medium"] | None = Field(
        None,
        description="float32 matrix products of training: high is TF32 on NVIDIA GPUs, medium may be bf16; evaluation "
        "keeps the process's own; none: training does, too",
    )
    on_nonfinite: Literal["raise", "skip", "stop"] = Field(
        "raise",
        description="a NaN or infinite loss or gradient: raise ends the run as failed, skip leaves the step out, "
        "stop ends it with the epochs before",
    )
    max_skipped_steps: int = Field(
        10, ge=0, description="steps that on_nonfinite = 'skip' may leave out in a run; one more is an error"
    )
    checkpoint_minutes: float = Field(
        10.0,
        gt=0,
        description="minutes between checkpoints inside an epoch; every epoch ends with one anyway",
    )
    gradient_stats_every: int = Field(
        1,
        ge=0,
        description="epochs between measurements for gradient_stats.csv; 0: only what the balancer measures",
    )
    eval_batch_size: int | None = Field(
        None, ge=1, description="samples a batch in evaluation; none: 4 x batch_size"
    )
    drop_last: bool = Field(False, description="drop the last, smaller training batch")
    num_workers: int = Field(0, ge=0, description="DataLoader processes, for datasets that are not in memory")

    @model_validator(mode="after")
    def _min_lr_below_lr(self) -> Self:
        if self.scheduler_min_lr > self.lr:
            raise ValueError(f"scheduler_min_lr ({self.scheduler_min_lr:g}) is above lr ({self.lr:g})")
        return self
