"""The simulated fleet: NASA's format, the same for the same seed, and never mistaken for NASA's data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mtlbalance_cmapss.config import CmapssConfig, Subset
from mtlbalance_cmapss.dataset import build, load
from mtlbalance_cmapss.files import file_names, read_subset
from mtlbalance_cmapss.scaling import conditions_of
from mtlbalance_cmapss.simulate import Fleet, is_simulated, simulated_folder, write_fleet

from mtlbalance.datasets import InMemoryDataset
from mtlbalance.errors import DataError


def simulated(**options: object) -> CmapssConfig:
    return CmapssConfig.model_validate({"source": "simulated", "simulated_engines": 8} | options)


@pytest.mark.parametrize(("subset", "conditions"), [("FD001", 1), ("FD002", 6), ("FD003", 1), ("FD004", 6)])
def test_the_reader_accepts_what_is_written(tmp_path: Path, subset: Subset, conditions: int) -> None:
    write_fleet(Fleet(subset, 12, seed=3), tmp_path / "fleet")
    data = read_subset(tmp_path / "fleet", subset)
    lives = data.train.lengths
    assert len(lives) == len(data.test.starts) == 12
    assert lives.min() >= 128
    assert lives.max() <= 380
    assert len(set(lives.tolist())) > 6
    assert len(np.unique(conditions_of(data.train))) == conditions
    assert (data.test_rul_cycles >= 1).all()
    test_lives = data.test.lengths + data.test_rul_cycles
    assert test_lives.min() >= 128
    assert (data.test.lengths >= 0.2 * test_lives).all()
    columns = (tmp_path / "fleet" / f"train_{subset}.txt").read_text().splitlines()[0].split()
    assert len(columns) == 26
    assert columns[:2] == ["1", "1"]


def test_sensors_drift_with_wear(tmp_path: Path) -> None:
    write_fleet(Fleet("FD001", 12, seed=0), tmp_path / "fleet")
    train = read_subset(tmp_path / "fleet", "FD001").train
    early = train.cycle <= 20
    late = train.cycle > np.repeat(train.lengths, train.lengths) - 10
    drift = (train.sensors[late].mean(0) - train.sensors[early].mean(0)) / np.maximum(
        train.sensors[early].std(0), 1e-9
    )
    rising, falling, constant = [2, 3, 4, 11, 15, 17], [7, 12, 20, 21], [1, 5, 10, 16, 18, 19]
    assert (drift[np.array(rising) - 1] > 1).all()
    assert (drift[np.array(falling) - 1] < -1).all()
    assert np.abs(drift[np.array(constant) - 1]).max() < 0.01  # rounding alone


def test_there_is_something_to_learn(no_files: Path) -> None:
    """A straight line through the means of a window must beat guessing by far, on engines it never saw."""
    data = build(simulated(subset="FD002", simulated_engines=30))
    assert isinstance(data.train, InMemoryDataset)
    assert isinstance(data.test, InMemoryDataset)

    def design(windows: InMemoryDataset) -> np.ndarray:
        means = windows.inputs.mean(dim=1).double().numpy()
        return np.concatenate([means, np.ones((len(means), 1))], axis=1)

    true = data.train.targets["rul"].double().numpy()
    weights, *_ = np.linalg.lstsq(design(data.train), true, rcond=None)
    test = data.test.targets["rul"].double().numpy()
    error = np.sqrt(np.mean((design(data.test) @ weights - test) ** 2))
    guessing = np.sqrt(np.mean((true.mean() - test) ** 2))
    assert error < 0.75 * guessing
    assert error > 5  # and it is no toy: noise and variation are left


def test_the_same_fleet_has_the_same_bytes(tmp_path: Path) -> None:
    for folder, fleet in (
        ("a", Fleet("FD003", 5, 1)),
        ("b", Fleet("FD003", 5, 1)),
        ("c", Fleet("FD003", 5, 2)),
    ):
        write_fleet(fleet, tmp_path / folder)
    for name in file_names("FD003"):
        first, same, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == same
        assert first != other


def test_results_say_that_they_are_simulated(no_files: Path) -> None:
    data = build(CmapssConfig(subset="FD002", simulated_engines=8))  # source = "auto", and no files
    assert data.data_source == "simulated"
    assert data.facts["comparable_with_published"] is False
    assert data.facts["official_files"] is False
    assert data.notices[0].startswith("SIMULATED DATA")
    assert "not found" in data.notices[0]
    assert "as dataset.source asks" in build(simulated()).notices[0]


def test_fleets_are_kept_by_their_parameters(no_files: Path) -> None:
    load(simulated())
    load(simulated())
    load(simulated(simulated_seed=1))
    load(simulated(simulated_engines=5))
    load(simulated(subset="FD002"))
    kept = sorted(path.name for path in (no_files / "simulated").iterdir())
    assert kept == [
        "FD001-5-engines-seed-0-v1",
        "FD001-8-engines-seed-0-v1",
        "FD001-8-engines-seed-1-v1",
        "FD002-8-engines-seed-0-v1",
    ]


def test_a_kept_fleet_is_not_written_again(no_files: Path) -> None:
    fleet = Fleet("FD001", 4, 0)
    with simulated_folder(fleet) as folder:
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with simulated_folder(fleet) as again:
        assert {path.name: path.stat().st_mtime_ns for path in again.iterdir()} == before
    assert folder == again


def test_a_damaged_fleet_is_an_error(no_files: Path) -> None:
    with simulated_folder(Fleet("FD001", 4, 0)) as folder:
        pass
    path = folder / "test_FD001.txt"
    path.write_text(path.read_text()[:5000])
    with pytest.raises(
        DataError, match=r"test_FD001\.txt of this simulated fleet is damaged; delete the folder"
    ):
        build(simulated(simulated_engines=4))


def test_a_cache_folder_that_cannot_be_made_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "a-file"
    blocker.write_text("in the way of a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    monkeypatch.setenv("MTLBALANCE_CMAPSS_DIR", "")
    with simulated_folder(Fleet("FD001", 4, 0)) as folder:
        assert is_simulated(folder)
        assert len(read_subset(folder, "FD001").train.starts) == 4
    assert not folder.exists()
    assert build(simulated(simulated_engines=4)).data_source == "simulated"


def test_two_processes_may_write_the_same_fleet(tmp_path: Path) -> None:
    folder = tmp_path / "kept" / "fleet"
    command = "from mtlbalance_cmapss.simulate import *; import sys; "
    command += "write_fleet(Fleet('FD001', 4, 0), Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "examples" / "cmapss")}
    writers = [
        subprocess.Popen([sys.executable, "-c", command, str(folder)], env=environment) for _ in range(3)
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    assert [path.name for path in folder.parent.iterdir()] == ["fleet"]  # nothing half-made stays
    write_fleet(Fleet("FD001", 4, 0), tmp_path / "alone")
    for name in file_names("FD001"):
        assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_an_existing_folder_that_is_no_fleet_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OSError, match="not empty"):
        write_fleet(Fleet("FD001", 4, 0), tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "thesis.txt").exists()
