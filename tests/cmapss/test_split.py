"""Protocols: who is held out, where they are cut, and what a leak looks like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mtlbalance_cmapss.config import CmapssConfig
from mtlbalance_cmapss.dataset import build
from mtlbalance_cmapss.files import read_subset
from mtlbalance_cmapss.split import draw_rul_at_cut, split_engines
from mtlbalance_cmapss.windows import rul_of_rows

from mtlbalance.datasets import InMemoryDataset
from mtlbalance.errors import DataError
from mtlbalance.slots import MultiTaskData


def sets(data: MultiTaskData) -> tuple[InMemoryDataset, InMemoryDataset]:
    assert isinstance(data.train, InMemoryDataset)
    assert isinstance(data.validation, InMemoryDataset)
    return data.train, data.validation


def config(**options: object) -> CmapssConfig:
    defaults = {"source": "simulated", "simulated_engines": 20, "protocol": "honest"}
    return CmapssConfig.model_validate(defaults | options)


@pytest.mark.usefixtures("no_files")
def test_no_engine_is_on_both_sides() -> None:
    data = build(config(validation_fraction=0.3))
    train, validation = sets(data)
    trained, held_out = set(train.meta["unit"].tolist()), set(validation.meta["unit"].tolist())
    assert not trained & held_out
    assert trained | held_out == set(range(1, 21))
    assert len(held_out) == 6 == data.facts["validation_engines"]
    assert data.protocol == "honest"
    assert data.key_metric == "rmse_last"


@pytest.mark.usefixtures("no_files")
def test_held_out_engines_end_before_failure_with_true_labels() -> None:
    data = build(config(cap_test_labels=False))
    _, validation = sets(data)
    last = validation.meta["is_last"]
    assert int(last.sum()) == 4
    assert (validation.targets["rul"][last] >= 6).all()
    # Uncapped labels fall by one a cycle, and cycle + label is the engine's life all along.
    for unit in sorted(set(validation.meta["unit"].tolist())):
        rows = validation.meta["unit"] == unit
        life = validation.meta["cycle"][rows] + validation.targets["rul"][rows]
        assert len(set(life.tolist())) == 1
        assert 128 <= float(life[0]) <= 380


@pytest.mark.usefixtures("no_files")
def test_the_split_hangs_on_its_own_seed() -> None:
    first, again, other = (sets(build(config(split_seed=seed)))[1] for seed in (0, 0, 1))
    assert first.inputs.equal(again.inputs)
    assert set(first.meta["unit"].tolist()) != set(other.meta["unit"].tolist())


@pytest.mark.usefixtures("no_files")
def test_the_paper_protocol_watches_the_test_set_and_says_so() -> None:
    data = build(config(protocol="paper"))
    assert data.validation is None
    assert data.protocol == "paper"
    assert any("picked on the test set" in notice for notice in data.notices)
    assert data.facts["train_engines"] == 20


@pytest.mark.usefixtures("no_files")
def test_the_window_split_shares_engines_and_warns() -> None:
    data = build(config(protocol="window-split"))
    train, validation = sets(data)
    assert set(validation.meta["unit"].tolist()) <= set(train.meta["unit"].tolist())
    pairs = [
        set(zip(s.meta["unit"].tolist(), s.meta["cycle"].tolist(), strict=True)) for s in (train, validation)
    ]
    assert not pairs[0] & pairs[1]
    assert len(validation) == round(0.2 * (len(train) + len(validation)))
    assert data.key_metric == "rmse_all"
    assert any(notice.startswith("LEAK") for notice in data.notices)


def test_cuts_are_within_life_and_leave_history() -> None:
    rng = np.random.default_rng(0)
    lives = rng.integers(2, 400, 2000).astype(np.float64)
    rul = draw_rul_at_cut(lives, "FD001", rng)
    assert (rul == np.floor(rul)).all()
    assert rul.max() == 145
    assert (rul < lives).all()
    long = lives >= 26
    assert (rul[long] >= 6).all()
    assert (lives - rul)[long].min() >= 20


def test_a_single_engine_cannot_be_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(40, 26))
    table[:, 0], table[:, 1] = 1, np.arange(1, 41)
    for part in ("train", "test"):
        np.savetxt(tmp_path / f"{part}_FD001.txt", table, fmt="%.3f")
    (tmp_path / "RUL_FD001.txt").write_text("5\n")
    with pytest.raises(DataError, match="at least two training engines"):
        build(CmapssConfig(data_dir=tmp_path, protocol="honest"))


@pytest.mark.real_data
@pytest.mark.parametrize("subset", ["FD001", "FD002", "FD003", "FD004"])
def test_cuts_resemble_the_test_set(nasa_folder: Path, subset: str) -> None:
    """Held-out engines must be as near to failure as test engines are, on average and at the quartiles."""
    data = read_subset(nasa_folder, subset)  # type: ignore[arg-type]
    cuts = np.concatenate(
        [
            split_engines(data.train, subset, 0.5, seed).held_out_rul_cycles  # type: ignore[arg-type]
            for seed in range(20)
        ]
    )
    true = data.test_rul_cycles
    assert abs(cuts.mean() - true.mean()) < 15
    assert np.abs(np.quantile(cuts, [0.25, 0.5, 0.75]) - np.quantile(true, [0.25, 0.5, 0.75])).max() < 25
    split = split_engines(data.train, subset, 0.5, 0)  # type: ignore[arg-type]
    held_out = rul_of_rows(split.held_out, split.held_out_rul_cycles)
    full = rul_of_rows(data.train, np.zeros(len(data.train.starts)))
    key = data.train.unit * 1000 + data.train.cycle
    kept = np.isin(key, split.held_out.unit * 1000 + split.held_out.cycle)
    np.testing.assert_array_equal(held_out, full[kept])
