"""The engine ``ray``: the runs of a sweep as tasks of a Ray cluster."""

from __future__ import annotations

from pydantic import Field

from mtlbalance.plugins import EngineRegistration, PluginConfig, hookimpl

__version__ = "0.1.0"


class RayOptions(PluginConfig):
    """Options of the engine ``ray``."""

    address: str | None = Field(
        None,
        description='of a running cluster, such as "auto" or "ray://head:10001"; none: this machine alone',
    )
    per_device: int = Field(
        1, ge=1, description="runs at a time on each GPU: each asks for 1 / per_device of one"
    )
    gpus_per_run: float | None = Field(
        None, ge=0, description="share of a GPU, or GPUs; none: 1 / per_device where there are GPUs, else 0"
    )
    cpus_per_run: float = Field(1.0, gt=0, description="CPU cores a run asks for; its threads are as many")
    shared_folder: bool = Field(
        True,
        description="true: every node sees the sweep's folder; false: files are sent to a run and returned",
    )


@hookimpl
def register_engines() -> list[EngineRegistration]:
    """Bring the engine."""
    return [
        EngineRegistration(
            "ray",
            "tasks of a Ray cluster; GPUs can be shared, lost nodes are made up for",
            RayOptions,
            f"{__name__}.engine:RayEngine",
        )
    ]
