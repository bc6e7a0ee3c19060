"""Kill a sweep's driver and its runs at random moments, and see that no result is lost, repeated or wrong.

    python tests/torture/drivers.py --seed 1 --kills 40 --json out.json

Drivers and runs are real processes. Each sweep ends when a driver that nobody hurts has come to its end; its runs are
then compared, byte by byte, with those of a sweep that was left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CONFIG = """
run.device = "cpu"
dataset = { name = "toy", samples = 200 }
backbone = { name = "mlp", hidden_sizes = [8] }
balancer = { name = "gaba", warmup_steps = 5 }
training = { epochs = 20, batch_size = 16, warmup_epochs = 1, checkpoint_minutes = 0.002 }
"""
SWEEP = """
base = "study.toml"
[axes]
method = [{ balancer.name = "gaba" }]
seed = [{ run.seed = 1 }, { run.seed = 2 }]
"""
STOPS = {signal.SIGTERM: 75, signal.SIGINT: 130}
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGHUP, *STOPS]


@dataclass
class Count:
    """What was done, and what it cost."""

    sweeps: int = 0
    drivers_hurt: int = 0
    runs_killed: int = 0
    lost: int = 0
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str) -> None:
        """Note a broken promise."""
        self.lost += 1
        self.failures.append(what)
        print(f"LOST: {what}", file=sys.stderr, flush=True)


def start(scratch: Path, sweep: Path) -> subprocess.Popen[str]:
    """Start a driver; Ctrl-C reaches it even where this process ignores it."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "mtlbalance", "sweep", "run", "sweep.toml"),
            *("--out", str(sweep), "--per-device", "2", "--json"),
        ],
        cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def runs_of(sweep: Path) -> dict[str, dict[str, Any]]:
    """Return all that must be equal, by run."""
    found = {}
    for path in sorted(sweep.glob("*/*/results.json")):
        results = json.loads(path.read_text())
        del results["wall_seconds"]
        weights = (path.parent / "model.safetensors").read_bytes()
        stats = (path.parent / "gradient_stats.csv").read_bytes()
        found[str(path.parent.relative_to(sweep))] = {"results": results, "weights": weights, "stats": stats}
    return found


def processes(sweep: Path) -> list[int]:
    """Return the processes whose command names this sweep's folder, which has a name that no other has."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # just gone
            if f"{sweep}/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def events(run: Path) -> list[str]:
    """Return what a run's log tells."""
    return [json.loads(line)["event"] for line in (run / "log.jsonl").read_text().splitlines()]


def hurt_one_sweep(scratch: Path, chance: random.Random, count: Count, whole: dict[str, Any]) -> None:
    """Hurt drivers until one of them comes to its end by itself, and look at what there is."""
    count.sweeps += 1
    sweep = scratch / f"sweep{count.sweeps}"
    killed_runs = 0
    while True:
        driver = start(scratch, sweep)
        deadline = time.monotonic() + chance.uniform(0.2, 20.0)
        while driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            if chance.random() < 0.0005 and (pids := processes(sweep)):
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(pids), signal.SIGKILL)
                    killed_runs += 1
        if driver.poll() is not None:
            break
        signum = chance.choice(SIGNALS)
        driver.send_signal(signum)
        _, err = driver.communicate(timeout=120)
        count.drivers_hurt += 1
        if driver.returncode not in (-signum, STOPS.get(signum), 0) or "Traceback" in err:
            count.fail(f"{signum.name}: exit code {driver.returncode}, {err[-600:]}")
            return
        status = subprocess.run(
            [sys.executable, "-m", "mtlbalance", "sweep", "status", str(sweep), "--json"],
            cwd=scratch, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if status.returncode not in (0, 2) or (status.returncode == 2 and (sweep / "plan.json").exists()):
            count.fail(f"status after {signum.name}: exit code {status.returncode}, {status.stderr[-600:]}")
    count.runs_killed += killed_runs
    out, err = driver.communicate(timeout=120)
    if driver.returncode != 0:
        # A run that was killed more often than a driver tries it again has failed, and the next one takes it up.
        again = start(scratch, sweep)
        out, err = again.communicate(timeout=300)
        if again.returncode != 0 or not killed_runs:
            count.fail(f"the last driver: exit code {again.returncode}, {out[-300:]} {err[-600:]}")
            return
    # A driver that was killed may have left a run that had not got as far as its folder's lock: it finds it finished.
    deadline = time.monotonic() + 120
    while processes(sweep) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = runs_of(sweep)
    if found != whole:
        different = [name for name in whole if found.get(name) != whole[name]]
        count.fail(f"other results: {different} in {sweep}")
    for name in whole:
        told = events(sweep / name)
        if told.count("finished") != 1 or (told.count("started") > 1 and not killed_runs):
            count.fail(f"{name} was repeated: {told}")
    if processes(sweep):
        count.fail(f"processes are left: {processes(sweep)}")
    if not count.lost:
        shutil.rmtree(sweep)


def main() -> int:
    """Do it; print and return what was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=40, help="of drivers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="mtlbalance-drivers-"))
    (scratch / "study.toml").write_text(CONFIG)
    (scratch / "sweep.toml").write_text(SWEEP)
    started = time.monotonic()
    _, err = (alone := start(scratch, scratch / "alone")).communicate(timeout=600)
    assert alone.returncode == 0, err
    whole = runs_of(scratch / "alone")
    assert len(whole) == 2
    count, chance = Count(), random.Random(options.seed)
    while count.drivers_hurt < options.kills and count.lost < 3:
        hurt_one_sweep(scratch, chance, count, whole)
    document = {"seed": options.seed, "seconds": round(time.monotonic() - started, 1), **asdict(count)}
    text = json.dumps(document, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    if not count.lost:
        shutil.rmtree(scratch)
    return 1 if count.lost else 0


if __name__ == "__main__":
    sys.exit(main())
