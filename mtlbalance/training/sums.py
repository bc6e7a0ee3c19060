"""``sums.json``: the SHA-256 sums of a finished run's files, by which damage is noticed later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mtlbalance.training import atomic

RESULTS = "results.json"
_FILES = ("model.safetensors", "metrics.csv", "gradient_stats.csv")
_SUMS = "sums.json"


def write_sums(run_dir: Path, results: bytes) -> None:
    """Write the sums of the run's files, and of the results that are to be written next."""
    with atomic.writing(run_dir / _SUMS):
        sums = {name: sha256((run_dir / name).read_bytes()) for name in _FILES}
    atomic.write_text(run_dir / _SUMS, json.dumps(sums | {RESULTS: sha256(results)}, indent=2) + "\n")


def damaged_files(run_dir: Path) -> list[str]:
    """Return the names of files that are not what was written, or cannot be read; none without ``sums.json``."""
    try:
        sums = json.loads((run_dir / _SUMS).read_bytes())
    except FileNotFoundError:
        return []  # of an earlier version
    except (OSError, ValueError):
        return [_SUMS]
    if not isinstance(sums, dict) or sums.keys() != {*_FILES, RESULTS}:
        return [_SUMS]
    return [name for name, expected in sums.items() if _sum_of(run_dir / name) != expected]


def sha256(content: bytes) -> str:
    """Return the sum as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _sum_of(path: Path) -> str:
    try:
        return sha256(path.read_bytes())
    except OSError:
        return ""
