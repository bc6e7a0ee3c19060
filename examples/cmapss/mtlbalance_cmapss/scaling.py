"""The 17 input features, and z-scores fitted on training rows alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from mtlbalance.errors import DataError

from .files import NUM_SETTINGS, Floats, Ints, Trajectories, line_of_row

# The other seven sensors are (almost) constant in FD001 and FD003.
FEATURE_SENSORS = (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)
FEATURE_NAMES = (
    *(f"setting_{number}" for number in range(1, NUM_SETTINGS + 1)),
    *(f"sensor_{number}" for number in FEATURE_SENSORS),
)

# Operating conditions: setting_1 in thousand feet. Within a condition it moves by about 0.01.
ALTITUDES_KFT = np.array([0.0, 10.0, 20.0, 25.0, 35.0, 42.0])
MAX_ALTITUDE_JITTER_KFT = 1.0

MIN_STD = 1e-8


def features_of(rows: Trajectories) -> Floats:
    """Return (R, 17): the three settings, then the fourteen sensors that move."""
    sensors = rows.sensors[:, np.array(FEATURE_SENSORS) - 1]
    return np.concatenate([rows.settings, sensors], axis=1)


def conditions_of(rows: Trajectories) -> Ints:
    """Return (R,) the operating condition of each row: the index of the nearest known altitude."""
    nearest: Ints = np.abs(rows.settings[:, :1] - ALTITUDES_KFT).argmin(axis=1)
    return nearest


def check_altitudes(rows: Trajectories) -> None:
    """Raise if a row of a whole file is at none of the six known altitudes.

    Raises:
        DataError: naming the file and the line.
    """
    jitter = np.abs(rows.settings[:, 0] - ALTITUDES_KFT[conditions_of(rows)])
    if (jitter > MAX_ALTITUDE_JITTER_KFT).any():
        row = int(np.argmax(jitter > MAX_ALTITUDE_JITTER_KFT))
        raise DataError(
            f"{rows.path}:{line_of_row(rows.path, row)}: setting_1 = {rows.settings[row, 0]:g} is near none "
            f"of the known altitudes {ALTITUDES_KFT.tolist()}; set per_condition = false for other data"
        )


@dataclass(frozen=True)
class Scaler:
    """Mean and standard deviation of each feature, by operating condition.

    Args:
        mean: (C, 17), one row a group; C is 1 where all rows are scaled together.
        std: (C, 17), with 1 where a feature is constant.
        seen: (C,) whether training had a row of this group.
        per_condition: whether groups are the operating conditions.
    """

    mean: Floats
    std: Floats
    seen: npt.NDArray[np.bool_]
    per_condition: bool

    @classmethod
    def fit(cls, rows: Trajectories, *, per_condition: bool, settings_globally: bool = True) -> Self:
        """Fit on training rows.

        Args:
            rows: of training engines only.
            per_condition: sensors within each operating condition, instead of over all rows.
            settings_globally: the three settings over all rows even so. Inside a condition they are
                measurement jitter, which unit variance would blow up to the size of a signal.
        """
        features = features_of(rows)
        groups = conditions_of(rows) if per_condition else np.zeros(len(rows), dtype=np.int64)
        num_groups = len(ALTITUDES_KFT) if per_condition else 1
        mean = np.tile(features.mean(axis=0), (num_groups, 1))
        std = np.tile(features.std(axis=0), (num_groups, 1))
        by_group = slice(NUM_SETTINGS, None) if settings_globally else slice(None)
        seen = np.bincount(groups, minlength=num_groups) > 0
        for group in np.flatnonzero(seen):
            members = features[groups == group, by_group]
            mean[group, by_group] = members.mean(axis=0)
            std[group, by_group] = members.std(axis=0)
        std[std < MIN_STD] = 1.0
        return cls(mean, std, seen, per_condition)

    def transform(self, rows: Trajectories) -> npt.NDArray[np.float32]:
        """Return the scaled features, (R, 17).

        Raises:
            DataError: a row's operating condition never occurred in training.
        """
        features = features_of(rows)
        groups = conditions_of(rows) if self.per_condition else np.zeros(len(rows), dtype=np.int64)
        unseen = np.unique(groups[~self.seen[groups]])
        if len(unseen):
            raise DataError(
                f"{rows.path}: no training engine flew at {ALTITUDES_KFT[unseen].tolist()} thousand feet, so "
                "its sensors cannot be scaled per condition; use more training engines or per_condition = false"
            )
        scaled: Floats = (features - self.mean[groups]) / self.std[groups]
        return scaled.astype(np.float32)
