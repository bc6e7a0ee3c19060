"""A simulated fleet for machines without NASA's files, written in their format.

Engines fly at NASA's operating conditions and wear exponentially until they fail. The atmosphere is
the standard one; everything else is a plausible sketch of a turbofan, good enough to learn from and
to try the software on. It is not NASA's simulator, and its results compare with nothing published.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mtlbalance.errors import DataError

from .checksums import sha256_of
from .config import MULTI_CONDITION_SUBSETS, SUBSETS, Subset
from .files import Floats, Ints, file_names
from .locate import cache_folder
from .split import draw_rul_at_cut

MARKER = "SIMULATED.json"
# Part of every folder's name: raise it with any change to the numbers written.
SIMULATOR_VERSION = 1

MIN_LIFE_CYCLES, MAX_LIFE_CYCLES = 128, 380

# Altitude (thousand feet), Mach number, throttle angle (degrees), and their jitter in flight.
CONDITIONS = np.array(
    [
        [0.0, 0.00, 100.0],
        [10.0, 0.25, 100.0],
        [20.0, 0.70, 100.0],
        [25.0, 0.62, 60.0],
        [35.0, 0.84, 100.0],
        [42.0, 0.84, 100.0],
    ]
)
SETTING_JITTER = np.array([0.002, 0.0003, 0.0])

# Sensor by sensor at sea level and full throttle: healthy value, noise, and the change at failure for
# wear of the compressor and of the fan. How it scales with flight: t, with the square root of inlet
# temperature; T, with inlet temperature; P, with inlet pressure; -, not.
SENSORS: tuple[tuple[str, float, float, float, float, str], ...] = (
    ("T2 fan inlet temperature", 518.67, 0.0, 0.0, 0.0, "T"),
    ("T24 LPC outlet temperature", 642.2, 0.35, 1.9, 1.4, "T"),
    ("T30 HPC outlet temperature", 1585.0, 4.8, 18.0, 15.0, "T"),
    ("T50 LPT outlet temperature", 1400.0, 4.8, 30.0, 22.0, "T"),
    ("P2 fan inlet pressure", 14.62, 0.0, 0.0, 0.0, "P"),
    ("P15 bypass pressure", 21.61, 0.002, 0.0, 0.02, "P"),
    ("P30 HPC outlet pressure", 554.2, 0.45, -3.4, 6.0, "P"),
    ("Nf fan speed", 2388.0, 0.05, 0.22, -0.20, "t"),
    ("Nc core speed", 9050.0, 7.0, 45.0, 60.0, "t"),
    ("epr engine pressure ratio", 1.3, 0.0, 0.0, 0.01, "-"),
    ("Ps30 HPC outlet static pressure", 47.3, 0.13, 1.05, 0.80, "P"),
    ("phi fuel flow over Ps30", 522.0, 0.40, -3.1, 5.5, "P"),
    ("NRf corrected fan speed", 2388.0, 0.05, 0.22, -0.18, "-"),
    ("NRc corrected core speed", 8140.0, 6.0, 35.0, 50.0, "-"),
    ("BPR bypass ratio", 8.41, 0.022, 0.14, -0.16, "-"),
    ("farB burner fuel-air ratio", 0.03, 0.0, 0.0, 0.0, "-"),
    ("htBleed bleed enthalpy", 392.0, 1.0, 6.0, 4.5, "T"),
    ("Nf_dmd demanded fan speed", 2388.0, 0.0, 0.0, 0.0, "-"),
    ("PCNfR_dmd demanded corrected fan speed", 100.0, 0.0, 0.0, 0.0, "-"),
    ("W31 HPT coolant bleed", 38.9, 0.10, -0.75, 1.0, "P"),
    ("W32 LPT coolant bleed", 23.35, 0.06, -0.45, 0.6, "P"),
)
FORMAT = ["%d", "%d", "%.4f", "%.4f", "%.1f"] + ["%.4f"] * len(SENSORS)


@dataclass(frozen=True)
class Fleet:
    """What decides a simulated fleet, down to the last digit.

    Args:
        subset: FD002 and FD004 fly at six conditions, the others at one; FD003 and FD004 have two faults.
        num_engines: engines in the training file, and as many in the test file.
        seed: of everything drawn.
    """

    subset: Subset
    num_engines: int
    seed: int

    @property
    def key(self) -> str:
        """A folder name that tells fleets apart."""
        return f"{self.subset}-{self.num_engines}-engines-seed-{self.seed}-v{SIMULATOR_VERSION}"


def is_simulated(folder: Path) -> bool:
    """Whether the files in a folder were written by this module."""
    return (folder / MARKER).exists()


@contextmanager
def simulated_folder(fleet: Fleet) -> Iterator[Path]:
    """Give a folder with the fleet's files: kept in the cache folder, or temporary if that is not writable.

    Raises:
        DataError: a kept fleet was damaged.
    """
    folder = cache_folder() / "simulated" / fleet.key
    try:
        if not folder.exists():
            write_fleet(fleet, folder)
    except OSError:
        with tempfile.TemporaryDirectory(prefix="mtlbalance-cmapss-") as temporary:
            folder = Path(temporary) / fleet.key
            write_fleet(fleet, folder)
            yield folder
        return
    _check_undamaged(folder)
    yield folder


def write_fleet(fleet: Fleet, folder: Path) -> None:
    """Write the three files and a marker into a new folder, all at once.

    Two processes may do so at the same time: each writes beside the folder and renames, and the
    slower one finds the folder there and leaves it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_files(fleet, building)
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:
            if not is_simulated(folder):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_files(fleet: Fleet, folder: Path) -> None:
    train_rng, test_rng = (
        np.random.default_rng([fleet.seed, SUBSETS.index(fleet.subset), part]) for part in (0, 1)
    )
    train_name, test_name, rul_name = file_names(fleet.subset)
    lives = _draw_lives(fleet.num_engines, train_rng)
    _save(folder / train_name, _simulate(fleet.subset, lives, lives, train_rng), FORMAT)

    lives = _draw_lives(fleet.num_engines, test_rng)
    rul_cycles = draw_rul_at_cut(lives.astype(np.float64), fleet.subset, test_rng).astype(np.int64)
    _save(folder / test_name, _simulate(fleet.subset, lives, lives - rul_cycles, test_rng), FORMAT)
    _save(folder / rul_name, rul_cycles[:, None], ["%d"])

    marker = {
        "what": "a simulated fleet, not NASA's data",
        "fleet": asdict(fleet),
        "version": SIMULATOR_VERSION,
        "sha256": {name: sha256_of(folder / name) for name in file_names(fleet.subset)},
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _save(path: Path, table: npt.NDArray[np.generic], fmt: list[str]) -> None:
    with path.open("w", encoding="ascii", newline="\n") as file:
        np.savetxt(file, table, fmt=fmt)
        file.flush()
        os.fsync(file.fileno())


def _check_undamaged(folder: Path) -> None:
    try:
        expected = json.loads((folder / MARKER).read_text(encoding="utf-8"))["sha256"]
        damaged = [name for name, digest in expected.items() if sha256_of(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        damaged = [MARKER]
    if damaged:
        raise DataError(
            f"{folder}: {', '.join(damaged)} of this simulated fleet is damaged; delete the folder to remake it"
        )


def _draw_lives(num_engines: int, rng: np.random.Generator) -> Ints:
    """Lives of about 205 cycles, from 128 to 380."""
    lives = np.exp(rng.normal(np.log(205.0), 0.25, num_engines))
    return np.clip(np.rint(lives), MIN_LIFE_CYCLES, MAX_LIFE_CYCLES).astype(np.int64)


def _simulate(subset: Subset, lives: Ints, lengths: Ints, rng: np.random.Generator) -> Floats:
    """Return the (R, 26) table of engines with these lives, recorded for ``lengths`` cycles."""
    num_engines = len(lives)
    engine = np.repeat(np.arange(num_engines), lengths)
    cycle = np.arange(len(engine)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1

    # Wear starts between 0 and 6 % and grows exponentially to 1, which is failure.
    initial_wear = rng.uniform(0.0, 0.06, num_engines)[engine]
    growth = rng.uniform(3.0, 5.0, num_engines)[engine]
    wear = initial_wear + (1 - initial_wear) * np.expm1(growth * cycle / lives[engine]) / np.expm1(growth)

    num_faults = 2 if subset in ("FD003", "FD004") else 1
    fault = rng.integers(num_faults, size=num_engines)[engine]
    num_conditions = len(CONDITIONS) if subset in MULTI_CONDITION_SUBSETS else 1
    nominal = CONDITIONS[rng.integers(num_conditions, size=len(engine))]
    settings = nominal + rng.uniform(-1.0, 1.0, nominal.shape) * SETTING_JITTER
    settings[:, 1] = np.maximum(settings[:, 1], 0.0)

    healthy, noise, *wear_effects = (
        np.array([sensor[column] for sensor in SENSORS], dtype=np.float64) for column in (1, 2, 3, 4)
    )
    # No two engines leave the factory alike, nor wear alike.
    offset = 0.5 * noise * rng.normal(size=(num_engines, len(SENSORS)))
    sensitivity = 1 + 0.1 * rng.normal(size=(num_engines, len(SENSORS)))
    change = wear[:, None] * sensitivity[engine] * np.stack(wear_effects)[fault]
    at_sea_level = healthy + offset[engine] + change + noise * rng.normal(size=change.shape)
    sensors = at_sea_level * _flight_factors(nominal)
    return np.concatenate([engine[:, None] + 1.0, cycle[:, None], settings, sensors], axis=1)


def _flight_factors(conditions: Floats) -> Floats:
    """Return (R, 21): what each sensor's sea-level reading is multiplied by at a condition."""
    altitude_kft, mach, throttle = conditions.T
    # The standard atmosphere up to the tropopause (36.1 thousand feet), isothermal above.
    static_temperature = np.maximum(1 - 0.0068756 * altitude_kft, 0.7519)
    below = (1 - 0.0068756 * np.minimum(altitude_kft, 36.089)) ** 5.2559
    static_pressure = below * np.exp(-np.maximum(altitude_kft - 36.089, 0) / 20.806)
    ram = 1 + 0.2 * mach**2
    temperature = static_temperature * ram
    pressure = static_pressure * ram**3.5
    inlet = np.array([sensor[0].startswith(("T2 ", "P2 ")) for sensor in SENSORS])
    scaling = np.array([sensor[5] for sensor in SENSORS])
    factors = np.ones((len(conditions), len(SENSORS)))
    factors[:, scaling == "t"] = np.sqrt(temperature)[:, None]
    factors[:, scaling == "T"] = temperature[:, None]
    factors[:, scaling == "P"] = pressure[:, None]
    # Less throttle: everything behind the inlet runs slower and cooler.
    factors[:, ~inlet] *= (0.75 + 0.25 * throttle / 100)[:, None]
    return factors
