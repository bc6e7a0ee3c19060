"""Protocols: who is held out, where they are cut, and what a leak looks like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mtlbalance_cmapss.config import SUBSETS, CmapssConfig, Subset
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
    assert (validation.targets["rul"][last] >= 1).all()
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
    assert rul.min() == 1, "no held-out engine has failed already"
    assert (rul <= 0.8 * lives).all(), "a fifth of its life is on record"
    np.testing.assert_array_equal(draw_rul_at_cut(np.ones(3), "FD001", rng), 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("subset", "longest"), [("FD001", 145), ("FD002", 195)])
def test_a_few_cuts_cover_the_whole_law(subset: Subset, longest: int, seed: int) -> None:
    """Fifty engines get one cut in every fiftieth of the range, in no order."""
    rul = draw_rul_at_cut(np.full(50, 400.0), subset, np.random.default_rng(seed))
    edges = np.linspace(1, longest + 1, 51)
    ordered = np.sort(rul)
    assert ((np.floor(edges[:-1]) <= ordered) & (ordered <= edges[1:])).all()
    assert abs(rul.mean() - (longest + 1) / 2) < 1.5
    assert abs(np.corrcoef(rul, np.arange(50))[0, 1]) < 0.5


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
@pytest.mark.parametrize("subset", SUBSETS)
def test_cuts_resemble_the_test_set(nasa_folder: Path, subset: Subset) -> None:
    """Held-out engines must be about as near to failure as test engines are, whatever the seed."""
    data = read_subset(nasa_folder, subset)
    true = data.test_rul_cycles
    of_seeds = [split_engines(data.train, subset, 0.2, seed).held_out_rul_cycles for seed in range(50)]
    for cuts in of_seeds:
        assert abs(cuts.mean() - true.mean()) < 10
        assert abs((cuts <= 30).mean() - (true <= 30).mean()) < 0.11
    cuts = np.concatenate(of_seeds)
    assert abs(cuts.mean() - true.mean()) < 6
    assert np.abs(np.quantile(cuts, [0.25, 0.5, 0.75]) - np.quantile(true, [0.25, 0.5, 0.75])).max() < 18
    assert abs((cuts <= 30).mean() - (true <= 30).mean()) < 0.05


@pytest.mark.real_data
@pytest.mark.parametrize("subset", SUBSETS)
def test_held_out_rows_keep_their_true_labels(nasa_folder: Path, subset: Subset) -> None:
    data = read_subset(nasa_folder, subset)
    split = split_engines(data.train, subset, 0.5, 0)
    held_out = rul_of_rows(split.held_out, split.held_out_rul_cycles)
    full = rul_of_rows(data.train, np.zeros(len(data.train.starts)))
    key = data.train.unit * 1000 + data.train.cycle
    kept = np.isin(key, split.held_out.unit * 1000 + split.held_out.cycle)
    np.testing.assert_array_equal(held_out, full[kept])
