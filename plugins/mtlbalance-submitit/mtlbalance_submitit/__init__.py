"""The engine ``submitit``: the runs of a sweep as jobs of SLURM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mtlbalance.plugins import EngineRegistration, PluginConfig, hookimpl

__version__ = "0.1.0"


class SubmititOptions(PluginConfig):
    """Options of the engine ``submitit``."""

    cluster: Literal["auto", "slurm", "local"] = Field(
        "auto", description="auto: SLURM where sbatch is found, else processes of this machine"
    )
    partition: str | None = Field(None, description="of SLURM; none: its default")
    minutes: int = Field(24 * 60, ge=1, description="time limit of a job")
    cpus_per_run: int = Field(2, ge=1, description="CPU cores of a job")
    gpus_per_run: int = Field(0, ge=0, description="GPUs of a job")
    memory_gb: float | None = Field(None, gt=0, description="memory of a job; none: SLURM's default")
    at_once: int = Field(100, ge=1, description="most jobs in the queue or running")
    parameters: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        description="anything else for submitit's update_parameters, such as slurm_account",
    )


@hookimpl
def register_engines() -> list[EngineRegistration]:
    """Bring the engine."""
    return [
        EngineRegistration(
            "submitit",
            "jobs of SLURM, through submitit",
            SubmititOptions,
            f"{__name__}.engine:SubmititEngine",
        )
    ]
