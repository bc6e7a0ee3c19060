"""The example is not installed for the tests: it is imported from its folder, as a config does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "cmapss"
sys.path.insert(0, str(EXAMPLE))


@pytest.fixture
def no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without NASA's files; returns the (empty) cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MTLBALANCE_CMAPSS_DIR", "")
    return tmp_path / "cache" / "mtlbalance" / "cmapss"


@pytest.fixture(scope="session")
def nasa_folder() -> Path:
    """The folder of NASA's files, or a visible skip."""
    folder = os.environ.get("MTLBALANCE_CMAPSS_DIR")
    if not folder:
        pytest.skip("needs NASA's files: set MTLBALANCE_CMAPSS_DIR")
    return Path(folder)


WriteSubset = Callable[..., Path]


@pytest.fixture
def write_subset(tmp_path: Path) -> WriteSubset:
    """Write a small FD001 (or other subset) of random numbers in NASA's format; returns its folder."""

    def write(
        train_lengths: tuple[int, ...] = (8, 6),
        test_lengths: tuple[int, ...] = (5, 3),
        rul: tuple[int, ...] = (10, 200),
        subset: str = "FD001",
        altitude: float = 0.0,
    ) -> Path:
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for part, lengths in (("train", train_lengths), ("test", test_lengths)):
            rows = [table(unit, length, rng, altitude) for unit, length in enumerate(lengths, start=1)]
            np.savetxt(folder / f"{part}_{subset}.txt", np.concatenate(rows), fmt="%.4f")
        np.savetxt(folder / f"RUL_{subset}.txt", np.array(rul), fmt="%d")
        return folder

    return write


def table(unit: int, length: int, rng: np.random.Generator, altitude: float) -> npt.NDArray[np.float64]:
    values = rng.normal(size=(length, 26))
    values[:, 0] = unit
    values[:, 1] = np.arange(1, length + 1)
    values[:, 2] = altitude
    return values
