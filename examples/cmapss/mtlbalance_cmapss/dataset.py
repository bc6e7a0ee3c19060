"""Building the ``cmapss`` dataset from text files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtlbalance.datasets import InMemoryDataset
from mtlbalance.errors import DataError
from mtlbalance.slots import InputSpec, MultiTaskData

from .checksums import differing_files
from .config import STUDY_RUL_CAP, CmapssConfig, tasks_of
from .files import Floats, SubsetData, Trajectories, read_subset, read_trajectories
from .locate import find_nasa_files
from .metrics import evaluate
from .scaling import FEATURE_NAMES, Scaler, check_altitudes
from .simulate import Fleet, is_simulated, simulated_folder
from .split import split_engines
from .windows import Windows, check_window, cut_windows, health_class, rul_of_rows


@dataclass(frozen=True)
class Source:
    """Files that were read, and what a user must know of them."""

    data: SubsetData
    data_source: str
    official: bool
    notices: tuple[str, ...]


def build(config: CmapssConfig) -> MultiTaskData:
    """Read the files and build the sets of the chosen protocol.

    Raises:
        DataError: files are missing or malformed, or a window is longer than every engine.
    """
    source = load(config)
    train, test = source.data.train, source.data.test
    check_window(train, config.window)
    if config.scales_per_condition:
        check_altitudes(train)
        check_altitudes(test)

    held_out: Trajectories | None = None
    held_out_rul_cycles = np.zeros(0)
    if config.protocol == "honest":
        if len(train.starts) < 2:
            raise DataError(f"{train.path}: protocol = 'honest' needs at least two training engines")
        split = split_engines(train, config.subset, config.validation_fraction, config.split_seed)
        train, held_out, held_out_rul_cycles = split.train, split.held_out, split.held_out_rul_cycles
        check_window(train, config.window)

    scaler = Scaler.fit(
        train, per_condition=config.scales_per_condition, settings_globally=config.scale_settings_globally
    )
    train_set = make_set(train, np.zeros(len(train.starts)), scaler, config, cap_labels=True)
    test_set = make_set(test, source.data.test_rul_cycles, scaler, config, cap_labels=config.cap_test_labels)
    validation_set: InMemoryDataset | None = None
    if held_out is not None:
        validation_set = make_set(
            held_out, held_out_rul_cycles, scaler, config, cap_labels=config.cap_test_labels
        )
    elif config.protocol == "window-split":
        train_set, validation_set = split_windows(train_set, config.validation_fraction, config.split_seed)

    # Held-out windows end anywhere in an engine's life: only all of them together mean something.
    key_metric = "rmse_all" if config.protocol == "window-split" else "rmse_last"
    return MultiTaskData(
        train=train_set,
        validation=validation_set,
        test=test_set,
        tasks=tasks_of(config),
        inputs=InputSpec(
            shape=(config.window, len(FEATURE_NAMES)),
            description=f"{config.window} cycles x {len(FEATURE_NAMES)} features",
            feature_names=FEATURE_NAMES,
        ),
        key_metric=key_metric,
        key_metric_mode="min",
        evaluate=evaluate,
        protocol=config.protocol,
        data_source=source.data_source,
        facts={
            "subset": config.subset,
            "protocol": config.protocol,
            "data_source": source.data_source,
            "official_files": source.official,
            "comparable_with_published": source.official
            and config.protocol != "window-split"
            and config.cap_test_labels
            and config.rul_cap == STUDY_RUL_CAP,
            "cap_test_labels": config.cap_test_labels,
            "rul_cap": config.rul_cap,
            "window": config.window,
            "pad": config.pad,
            "per_condition": config.scales_per_condition,
            "train_windows": len(train_set),
            "validation_windows": 0 if validation_set is None else len(validation_set),
            "test_windows": len(test_set),
            "train_engines": len(train.starts),
            "validation_engines": 0 if held_out is None else len(held_out.starts),
            "test_engines": len(test.starts),
        },
        notices=(*source.notices, *_protocol_notices(config)),
        read_inputs=partial(read_engines, scaler=scaler, config=config),
    )


def load(config: CmapssConfig) -> Source:
    """Read the NASA files where they are, else a simulated fleet.

    Raises:
        DataError: files are missing or malformed.
    """
    with _folder_of(config) as folder:
        data = read_subset(folder, config.subset)
        if is_simulated(folder):
            return Source(data, "simulated", official=False, notices=(_simulated_notice(config, folder),))
        differing = differing_files(folder, config.subset)
    notices: tuple[str, ...] = ()
    if differing:
        notices = (
            f"{folder}: {', '.join(differing)} differ from NASA's files (SHA256); results from them are not "
            "comparable with published ones. Some public copies of FD002 and FD004 are truncated.",
        )
    return Source(data, "nasa", official=not differing, notices=notices)


def make_set(
    rows: Trajectories, rul_at_end_cycles: Floats, scaler: Scaler, config: CmapssConfig, *, cap_labels: bool
) -> InMemoryDataset:
    """Cut scaled windows and label them.

    Args:
        rows: whole engines up to some cycle.
        rul_at_end_cycles: (E,) the life left after each engine's last row.
        scaler: fitted on training engines.
        config: window, padding, cap and thresholds.
        cap_labels: whether the RUL labels stop at the cap (health classes always look at the capped RUL).
    """
    windows = cut_windows(rows, config.window, config.pad)
    rul_cycles = rul_of_rows(rows, rul_at_end_cycles)[windows.last_row]
    labels = np.minimum(rul_cycles, config.rul_cap) if cap_labels else rul_cycles
    targets = {
        "rul": torch.from_numpy(labels.astype(np.float32)),
        "health": torch.from_numpy(health_class(rul_cycles, config.health_thresholds, config.rul_cap)),
    }
    return _scaled(rows, windows, scaler, targets)


def read_engines(path: Path, scaler: Scaler, config: CmapssConfig) -> InMemoryDataset:
    """Read engines whose remaining life is to be predicted: a file in the form of NASA's test files.

    Args:
        path: 26 columns without a header; units and cycles count from 1.
        scaler: fitted on the training engines.
        config: window and padding.

    Raises:
        DataError: the file is missing or malformed, or an engine flew where no training engine did.
    """
    rows = read_trajectories(path)
    if config.scales_per_condition:
        check_altitudes(rows)
    return _scaled(rows, cut_windows(rows, config.window, config.pad), scaler, targets={})


def _scaled(
    rows: Trajectories, windows: Windows, scaler: Scaler, targets: Mapping[str, Tensor]
) -> InMemoryDataset:
    return InMemoryDataset(
        inputs=torch.from_numpy(scaler.transform(rows)[windows.rows]),
        targets=targets,
        meta={
            "unit": torch.from_numpy(rows.unit[windows.last_row]),
            "cycle": torch.from_numpy(rows.cycle[windows.last_row]),
            "is_last": torch.from_numpy(windows.is_last),
        },
    )


def split_windows(
    windows: InMemoryDataset, fraction: float, seed: int
) -> tuple[InMemoryDataset, InMemoryDataset]:
    """Hold out random windows, whatever engine they are from: neighbours of each stay in training.

    This is the leak that ``protocol = "window-split"`` demonstrates; nothing else uses it.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(windows)))
    num_held_out = min(max(1, round(fraction * len(windows))), len(windows) - 1)
    held_out, kept = order[:num_held_out].sort().values, order[num_held_out:].sort().values
    return InMemoryDataset(*windows[kept]), InMemoryDataset(*windows[held_out])


@contextmanager
def _folder_of(config: CmapssConfig) -> Iterator[Path]:
    folder = find_nasa_files(config)
    if folder is None:
        fleet = Fleet(config.subset, config.simulated_engines, config.simulated_seed)
        with simulated_folder(fleet) as folder:
            yield folder
    elif config.source == "nasa" and is_simulated(folder):
        raise DataError(f"{folder}: holds a simulated fleet, but dataset.source = 'nasa'")
    else:
        yield folder


def _simulated_notice(config: CmapssConfig, folder: Path) -> str:
    if config.source == "simulated":
        reason = "as dataset.source asks"
    elif find_nasa_files(config) is None:
        reason = "because NASA's files were not found"
    else:
        reason = f"because that is what {folder} holds"
    return (
        f"SIMULATED DATA: a made-up fleet stands in for {config.subset}, {reason}. "
        "Its results say nothing about real engines and must not be compared with published ones."
    )


def _protocol_notices(config: CmapssConfig) -> tuple[str, ...]:
    if config.protocol == "paper":
        return (
            "protocol = 'paper': the best epoch is picked on the test set, as in the study, so the result is "
            "optimistic; protocol = 'honest' picks it on held-out training engines.",
        )
    if config.protocol == "window-split":
        return (
            "LEAK: protocol = 'window-split' validates on windows of engines that are trained on, so the "
            "validation error is far below the error on new engines; never report it.",
        )
    return ()
