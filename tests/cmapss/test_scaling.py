"""The scaler against plain NumPy in float64, and what it must not look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mtlbalance_cmapss.config import CmapssConfig
from mtlbalance_cmapss.dataset import build
from mtlbalance_cmapss.files import Trajectories
from mtlbalance_cmapss.scaling import FEATURE_NAMES, Scaler, check_altitudes, conditions_of

from mtlbalance.errors import DataError


def fleet(altitudes: list[float], rows_each: int = 40, seed: int = 0) -> Trajectories:
    """One engine that visits each altitude in turn, whose sensors depend on the altitude."""
    rng = np.random.default_rng(seed)
    altitude = np.tile(altitudes, rows_each)
    num_rows = len(altitude)
    settings = np.stack([altitude + rng.uniform(-0.01, 0.01, num_rows), altitude / 50, 0 * altitude + 100], 1)
    sensors = rng.normal(size=(num_rows, 21)) * np.arange(1, 22) + 1000 * altitude[:, None]
    return Trajectories(
        Path("train.txt"), np.ones(num_rows, dtype=np.int64), np.arange(1, num_rows + 1), settings, sensors
    )


def test_features_are_three_settings_and_fourteen_sensors() -> None:
    sensors = [2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21]
    assert ("setting_1", "setting_2", "setting_3", *(f"sensor_{n}" for n in sensors)) == FEATURE_NAMES
    rows = fleet([0.0])
    scaler = Scaler.fit(rows, per_condition=False)
    np.testing.assert_allclose(
        scaler.mean[0, 3:], [rows.sensors[:, n - 1].mean() for n in sensors], rtol=1e-12
    )


def test_global_scaling_against_numpy() -> None:
    rows = fleet([0.0, 35.0])
    scaled = Scaler.fit(rows, per_condition=False).transform(rows)
    column = rows.sensors[:, 3]
    np.testing.assert_allclose(scaled[:, 5], (column - column.mean()) / column.std(), rtol=1e-5, atol=1e-6)
    assert scaled.dtype == np.float32


def test_scaling_per_condition_against_numpy() -> None:
    rows = fleet([0.0, 10.0, 20.0, 25.0, 35.0, 42.0])
    scaled = Scaler.fit(rows, per_condition=True).transform(rows)
    for altitude in (0.0, 10.0, 20.0, 25.0, 35.0, 42.0):
        members = np.abs(rows.settings[:, 0] - altitude) < 0.5
        column = rows.sensors[members, 1]
        np.testing.assert_allclose(
            scaled[members, 3], (column - column.mean()) / column.std(), rtol=1e-4, atol=1e-5
        )
    # The settings tell conditions apart, so they stay on one scale.
    setting = rows.settings[:, 0]
    np.testing.assert_allclose(scaled[:, 0], (setting - setting.mean()) / setting.std(), rtol=1e-5)


def test_the_literal_reading_blows_up_the_jitter_of_settings() -> None:
    rows = fleet([0.0, 42.0])
    scaled = Scaler.fit(rows, per_condition=True, settings_globally=False).transform(rows)
    members = rows.settings[:, 0] > 20
    assert scaled[members, 0].std() == pytest.approx(1.0, abs=1e-3)
    assert scaled[members, 0].mean() == pytest.approx(0.0, abs=1e-3)


def test_constant_features_become_zero() -> None:
    rows = fleet([0.0])
    rows.sensors[:, 1] = 518.67
    scaled = Scaler.fit(rows, per_condition=False).transform(rows)
    assert np.abs(scaled[:, [2, 3]]).max() < 1e-6  # setting_3 and sensor_2
    assert np.isfinite(scaled).all()


def test_conditions_are_the_nearest_known_altitudes() -> None:
    rows = fleet([42.0, 25.0, 0.0, 20.0, 35.0, 10.0], rows_each=3)
    assert conditions_of(rows).tolist() == [5, 3, 0, 2, 4, 1] * 3


def test_an_unknown_altitude_is_named_with_its_line(write_subset: Callable[..., Path]) -> None:
    folder = write_subset(subset="FD002", altitude=42.0)
    path = folder / "test_FD002.txt"
    lines = path.read_text().splitlines()
    lines[6] = lines[6].replace("42.0000", "39.0000", 1)
    path.write_text("\n".join(lines))
    with pytest.raises(
        DataError, match=r"test_FD002\.txt:7: setting_1 = 39 is near none .* per_condition = false"
    ):
        build(CmapssConfig(subset="FD002", data_dir=folder, window=4))
    build(CmapssConfig(subset="FD002", data_dir=folder, window=4, per_condition=False))


def test_a_condition_that_training_never_saw_is_an_error() -> None:
    train, test = fleet([0.0, 10.0]), fleet([0.0, 42.0])
    check_altitudes(test)
    with pytest.raises(DataError, match=r"no training engine flew at \[42\.0\] thousand feet"):
        Scaler.fit(train, per_condition=True).transform(test)


def test_test_rows_do_not_move_the_scaler(write_subset: Callable[..., Path]) -> None:
    folder = write_subset()
    before = build(CmapssConfig(data_dir=folder, window=4))
    path = folder / "test_FD001.txt"
    table = np.loadtxt(path)
    table[:, 5:] *= 50
    np.savetxt(path, table, fmt="%.4f")
    after = build(CmapssConfig(data_dir=folder, window=4))
    assert before.train.inputs.equal(after.train.inputs)  # type: ignore[attr-defined]
    assert not before.test.inputs.equal(after.test.inputs)  # type: ignore[attr-defined]


def test_held_out_engines_do_not_move_the_scaler(write_subset: Callable[..., Path]) -> None:
    folder = write_subset(train_lengths=(60, 50, 70, 55))
    config = CmapssConfig(data_dir=folder, window=4, protocol="honest", validation_fraction=0.25)
    before = build(config)
    held_out = set(before.validation.meta["unit"].tolist())  # type: ignore[union-attr]
    path = folder / "train_FD001.txt"
    table = np.loadtxt(path)
    table[np.isin(table[:, 0], list(held_out)), 5:] += 1000
    np.savetxt(path, table, fmt="%.4f")
    after = build(config)
    assert before.train.inputs.equal(after.train.inputs)  # type: ignore[attr-defined]
    assert before.test.inputs.equal(after.test.inputs)  # type: ignore[attr-defined]
    assert not before.validation.inputs.equal(after.validation.inputs)  # type: ignore[union-attr]


def test_the_mask_of_a_selection_keeps_rows_together() -> None:
    rows = fleet([0.0, 10.0], rows_each=2)
    unit = np.array([1, 1, 2, 2])
    kept = replace(rows, unit=unit).select(unit == 2)
    assert kept.unit.tolist() == [2, 2]
    np.testing.assert_array_equal(kept.sensors, rows.sensors[2:])
