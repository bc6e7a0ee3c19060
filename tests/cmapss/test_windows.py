"""Windows and labels against a loop that says what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mtlbalance_cmapss.config import CmapssConfig, PadMode
from mtlbalance_cmapss.dataset import build
from mtlbalance_cmapss.files import Trajectories
from mtlbalance_cmapss.windows import cut_windows, health_class, rul_of_rows
from pydantic import ValidationError

from mtlbalance.errors import DataError


def engines(lengths: list[int]) -> Trajectories:
    unit = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    cycle = np.concatenate([np.arange(1, length + 1) for length in lengths])
    return Trajectories(Path("train.txt"), unit, cycle, np.zeros((len(unit), 3)), np.zeros((len(unit), 21)))


def windows_by_loop(lengths: list[int], window: int, pad: PadMode) -> list[list[int]]:
    found = []
    first_row = 0
    for length in lengths:
        rows = list(range(first_row, first_row + length))
        if pad == "all" or length < window:
            rows = [first_row] * (window - 1) + rows
        found += [rows[start : start + window] for start in range(len(rows) - window + 1)]
        if pad == "short" and length < window:
            del found[-length:-1]
        first_row += length
    return found


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    window=st.integers(1, 9),
    pad=st.sampled_from(["short", "all"]),
)
def test_windows_equal_a_loop(lengths: list[int], window: int, pad: PadMode) -> None:
    trajectories = engines(lengths)
    windows = cut_windows(trajectories, window, pad)
    expected = windows_by_loop(lengths, window, pad)
    assert windows.rows.tolist() == expected
    assert windows.last_row.tolist() == [rows[-1] for rows in expected]
    ends = set((np.cumsum(lengths) - 1).tolist())
    assert windows.is_last.tolist() == [rows[-1] in ends for rows in expected]
    assert windows.is_last.sum() == len(lengths)  # no engine is lost


@given(
    lives=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 200)), min_size=1, max_size=5),
)
def test_rul_counts_down_to_what_is_left(lives: list[tuple[int, int]]) -> None:
    trajectories = engines([length for length, _ in lives])
    expected = [left + length - cycle for length, left in lives for cycle in range(1, length + 1)]
    rul = rul_of_rows(trajectories, np.array([left for _, left in lives], dtype=np.float64))
    assert rul.tolist() == expected


def test_health_classes_at_their_edges() -> None:
    rul = np.array([300.0, 125.0, 80.5, 80.0, 30.5, 30.0, 0.0])
    assert health_class(rul, (80.0, 30.0), 125.0).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_labels_of_a_built_dataset(write_subset: Callable[..., Path]) -> None:
    folder = write_subset(train_lengths=(140, 6), test_lengths=(5, 3), rul=(10, 200))
    data = build(CmapssConfig(data_dir=folder, window=4))
    inputs, targets, meta = data.train[0]
    assert tuple(inputs.shape) == data.inputs.shape
    assert targets["rul"] == 125.0  # 136 cycles are left, capped
    assert data.train.targets["rul"][-3:].tolist() == [2.0, 1.0, 0.0]  # type: ignore[attr-defined]
    assert meta["cycle"] == 4
    test = data.test.targets  # type: ignore[attr-defined]
    assert test["rul"].tolist() == [11.0, 10.0, 125.0]  # the second engine is padded, and capped
    assert test["health"].tolist() == [2, 2, 0]
    uncapped = build(CmapssConfig(data_dir=folder, window=4, cap_test_labels=False))
    assert uncapped.test.targets["rul"].tolist() == [11.0, 10.0, 200.0]  # type: ignore[attr-defined]
    assert uncapped.train.targets["rul"].max() == 125.0  # type: ignore[attr-defined]
    assert uncapped.facts["comparable_with_published"] is False


@pytest.mark.parametrize("pad", ["short", "all"])
def test_a_window_longer_than_every_engine_is_an_error(
    write_subset: Callable[..., Path], pad: PadMode
) -> None:
    folder = write_subset(train_lengths=(8, 6))
    with pytest.raises(
        DataError, match=r"window = 9 is longer than every engine \(the longest has 8 cycles\)"
    ):
        build(CmapssConfig(data_dir=folder, window=9, pad=pad))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"health_thresholds": (30.0, 80.0)}, "positive and falling"),
        ({"health_thresholds": (80.0, 0.0)}, "positive and falling"),
        ({"health_thresholds": (125.0, 50.0)}, "health class 0 would be empty"),
        ({"subset": "FD005"}, "FD001"),
        ({"rul_cap": 0.0}, "greater than 0"),
        ({"windw": 30}, "Extra inputs"),
    ],
)
def test_impossible_options_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CmapssConfig.model_validate(options)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("subset", "pad", "train_windows", "test_engines"),
    [
        ("FD001", "short", 17_731, 100),
        ("FD002", "short", 46_219, 259),
        ("FD003", "short", 21_820, 100),
        ("FD004", "short", 54_028, 248),
        ("FD001", "all", 20_631, 100),
        ("FD002", "all", 53_759, 259),
        ("FD003", "all", 24_720, 100),
        ("FD004", "all", 61_249, 248),
    ],
)
def test_window_counts_of_nasa_files(
    nasa_folder: Path, subset: str, pad: PadMode, train_windows: int, test_engines: int
) -> None:
    config = CmapssConfig(subset=subset, pad=pad, data_dir=nasa_folder)
    data = build(config)
    assert len(data.train) == train_windows  # type: ignore[arg-type]
    meta = data.test.meta  # type: ignore[attr-defined]
    assert len(set(meta["unit"].tolist())) == int(meta["is_last"].sum()) == test_engines
    assert data.facts["train_windows"] == train_windows
    assert data.facts["comparable_with_published"] is True
    assert data.train.inputs.isfinite().all()  # type: ignore[attr-defined]


@pytest.mark.real_data
@pytest.mark.parametrize(("protocol", "comparable"), [("honest", True), ("window-split", False)])
def test_a_leak_is_never_comparable(nasa_folder: Path, protocol: str, comparable: bool) -> None:
    data = build(CmapssConfig.model_validate({"data_dir": nasa_folder, "protocol": protocol}))
    assert data.facts["official_files"] is True
    assert data.facts["comparable_with_published"] is comparable
