"""Where a run was made: ``environment.json``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

from mtlbalance.training.devices import device_name


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return versions, machine, device, git commit of the current folder (if any) and command line."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "device": device_name(device),
        "git_commit": _git_commit(),
        "command": sys.argv,
        "packages": {
            dist.metadata["Name"]: dist.version
            for dist in sorted(
                importlib.metadata.distributions(), key=lambda dist: str(dist.metadata["Name"]).lower()
            )
            if dist.metadata["Name"]
        },
    }


def _git_commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        found = subprocess.run(
            [git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
