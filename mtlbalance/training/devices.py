"""From the config's device name to a device that exists."""

from __future__ import annotations

import platform
import re

import torch

from mtlbalance.errors import DeviceError


def resolve_device(name: str, *, option: str = "run.device") -> torch.device:
    """Return the device; ``auto`` takes CUDA, then MPS, then the CPU.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        option: where the user said so, for messages.

    Raises:
        DeviceError: there is no such device, or this machine does not have it.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise DeviceError(f"{option} = {name!r} is no device; use auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise DeviceError(
                f"{option} = {name!r}, but no CUDA device can be used here (torch {torch.__version__}); "
                f"use {option}=cpu, or install a CUDA build of torch"
            )
        if device.index is not None and device.index >= count:
            raise DeviceError(f"{option} = {name!r}, but this machine has CUDA devices 0 to {count - 1}")
    if device.type == "mps" and not has_mps:
        raise DeviceError(f"{option} = 'mps', but this machine has no MPS device; use {option}=cpu")
    return device


def device_name(device: torch.device) -> str:
    """Return a name for people, such as ``"cuda:0 (NVIDIA H200)"``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()})"
