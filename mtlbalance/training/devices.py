"""From the config's device name to a device that exists."""

from __future__ import annotations

import platform

import torch

from mtlbalance.errors import DeviceError


def resolve_device(name: str) -> torch.device:
    """Return the device; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        DeviceError: this machine does not have the device.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise DeviceError(
                f"run.device = {name!r}, but no CUDA device can be used here (torch {torch.__version__}); "
                "use run.device=cpu, or install a CUDA build of torch"
            )
        if device.index is not None and device.index >= count:
            raise DeviceError(f"run.device = {name!r}, but this machine has CUDA devices 0 to {count - 1}")
    if device.type == "mps" and not has_mps:
        raise DeviceError("run.device = 'mps', but this machine has no MPS device; use run.device=cpu")
    return device


def device_name(device: torch.device) -> str:
    """Return a name for people, such as ``"cuda:0 (NVIDIA H200)"``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()})"
