"""Hurt real runs in real processes, and see that a user loses nothing.

    python tests/torture/torture.py --seed 1 --kills 200 --stops 40 --damages 400 --races 20 --disks 20 --json out.json

Every run is a process of its own, forked from this one after the imports, so that kills hit the run and not the
interpreter's start. What is promised each time: the result equals that of a run that nobody touched, or there is a
clear error, and the run still gives that result once what was damaged is put back.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # no threads before a fork

from mtlbalance.cli.main import run_cli
from mtlbalance.cli.stops import leave_at_once

for name in ("mtlbalance.cli.app", "mtlbalance.training", "torch._dynamo", "torch._inductor"):
    importlib.import_module(name)  # all that a run imports sooner or later

CONFIG = """
run.name = "hurt"
run.device = "cpu"
dataset.name = "toy"
dataset.samples = 300
backbone.name = "mlp"
[balancer]
name = "gaba"
warmup_steps = 5
[training]
epochs = 4
batch_size = 16
lr = 0.01
warmup_epochs = 1
"""
VARIANTS = {
    "gaba": [],
    "saved at every step": ["training.checkpoint_minutes=1e-9"],
    "rlw, saved now and then": ["balancer.name=rlw", "training.checkpoint_minutes=0.0005"],
    "uncertainty in fp16": ["balancer.name=uncertainty", "training.precision=fp16"],
    "famo": ["balancer.name=famo", "training.checkpoint_minutes=0.001"],
    "upgrad": ["balancer.name=upgrad"],
}
STOPS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Count:
    """What was done to runs, and how many results it cost."""

    tried: int = 0
    lost: int = 0
    finished: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str) -> None:
        """Note a broken promise."""
        self.lost += 1
        self.failures.append(what)
        print(f"LOST: {what}", file=sys.stderr, flush=True)


class Run:
    """One run's folder, and the processes that work on it."""

    def __init__(self, folder: Path, variant: str, config: Path) -> None:
        self.folder = folder
        self.variant = variant
        self.config = config
        self.stderr = folder.with_name(f"{folder.name}.stderr")

    def start(self, *, file_size: int | None = None) -> int:
        """Start a process on the folder; return its id."""
        # A process that is just forked is not the command yet: it gets no signal before it has the command's handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            return pid
        try:
            log = os.open(self.stderr, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            command = ["run", str(self.config), *self.overrides, "--out", str(self.folder), "--quiet"]
            sys.argv = ["mtlbalance", *command]
            for signum in STOPS:
                signal.signal(signum, leave_at_once)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            run_cli()
        except SystemExit as leave:
            sys.stderr.flush()
            os._exit(leave.code if isinstance(leave.code, int) else 1)
        finally:
            os._exit(99)

    @property
    def overrides(self) -> list[str]:
        return VARIANTS[self.variant]

    def finish(self) -> int:
        """Run to the end; return the exit code."""
        return wait(self.start())

    def said(self) -> str:
        """Return what the processes wrote to stderr since the last time."""
        text = self.stderr.read_text() if self.stderr.exists() else ""
        self.stderr.unlink(missing_ok=True)
        return text

    def result(self) -> dict[str, Any]:
        """Return all that must be equal."""
        results = json.loads((self.folder / "results.json").read_text())
        del results["wall_seconds"]
        with (self.folder / "metrics.csv").open(newline="") as file:
            rows = [
                {key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)
            ]
        return {
            "results": results,
            "metrics": rows,
            "weights": (self.folder / "model.safetensors").read_bytes(),
            "gradient_stats": (self.folder / "gradient_stats.csv").read_bytes(),
        }


def wait(pid: int, seconds: float = 300.0) -> int:
    """Return a process's exit code, negative for a signal; one that hangs is killed, and -1000."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1000


class Torture:
    """All that is done to runs."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch = scratch
        self.random = random.Random(seed)
        self.config = scratch / "hurt.toml"
        self.config.write_text(CONFIG)
        self.number = 0
        self.whole: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, Count] = {}

    def new_run(self, variant: str) -> Run:
        self.number += 1
        return Run(self.scratch / f"run{self.number}", variant, self.config)

    def reference(self, variant: str) -> dict[str, Any]:
        """Return the result of a run that nobody touches."""
        if variant not in self.whole:
            run = self.new_run(variant)
            started = time.monotonic()
            assert run.finish() == 0, run.said()
            self.seconds[variant] = time.monotonic() - started
            self.whole[variant] = run.result()
            shutil.rmtree(run.folder)
        return self.whole[variant]

    def check(self, run: Run, count: Count, what: str) -> None:
        if run.result() != self.whole[run.variant]:
            different = [key for key, value in run.result().items() if value != self.whole[run.variant][key]]
            count.fail(f"{what}: other {', '.join(different)} ({run.folder})")
        else:
            count.finished += 1
            shutil.rmtree(run.folder)

    def signals(self, count: Count, tries: int, choices: list[int]) -> None:
        """Send signals at random moments, to one process after the other on the same folder, until the run ends."""
        while count.tried < tries:
            variant = self.random.choice(list(VARIANTS))
            self.reference(variant)
            run = self.new_run(variant)
            history = []
            while True:
                signum = self.random.choice(choices)
                pid = run.start()
                delay = self.random.uniform(0.0, 1.1 * self.seconds[variant])
                code = wait_or_signal(pid, delay, signum)
                text = run.said()
                history.append((round(delay, 4), signal.Signals(signum).name, code))
                expected = {0, -signal.SIGKILL, 75, 130}
                count.tried += code != 0
                if code not in expected or "Traceback" in text:
                    count.fail(f"signals {history}: exit code {code}, {text.strip()[-600:]}")
                    break
                if code == 0:
                    self.check(run, count, f"signals {history} on {variant}")
                    break

    def races(self, count: Count, tries: int) -> None:
        """Let several processes want one folder at once; sometimes the one that has it is killed."""
        while count.tried < tries:
            variant = self.random.choice(list(VARIANTS))
            self.reference(variant)
            run = self.new_run(variant)
            pids = [run.start() for _ in range(self.random.choice([2, 3]))]
            if self.random.random() < 0.5:
                time.sleep(self.random.uniform(0, self.seconds[variant]))
                os.kill(self.random.choice(pids), signal.SIGKILL)
            codes = sorted(wait(pid) for pid in pids)
            text = run.said()
            count.tried += 1
            count.refused += codes.count(2)
            told = text.count("is in use by another process")
            if not set(codes) <= {0, 2, -signal.SIGKILL} or told != codes.count(2):
                count.fail(f"race for one folder: exit codes {codes}, {text[-600:]}")
                continue
            code = run.finish()
            if code != 0:
                count.fail(f"after a race {codes}: exit code {code}, {run.said()[-600:]}")
                continue
            self.check(run, count, f"race {codes}")

    def disks(self, count: Count, tries: int) -> None:
        """Let writes fail from a random size on, as a full disk does."""
        while count.tried < tries:
            variant = self.random.choice(list(VARIANTS))
            self.reference(variant)
            run = self.new_run(variant)
            code = wait(run.start(file_size=self.random.randrange(1, 60_000)))
            text = run.said()
            count.tried += 1
            count.refused += code == 1
            if code not in (0, 1, 2) or "Traceback" in text or (code and "error: cannot " not in text):
                count.fail(f"full disk: exit code {code}, {text[-600:]}")
                continue
            code = run.finish()
            if code != 0:
                count.fail(f"after a full disk: exit code {code}, {run.said()[-600:]}")
                continue
            self.check(run, count, "full disk")

    def damages(self, count: Count, tries: int) -> None:
        """Flip bytes in, and cut, every file of a stopped and of a finished run, one at a time."""
        patients = list(self.patients())
        files = [(name, path) for name, patient in patients for path in all_files(patient.folder)]
        self.random.shuffle(files)
        while count.tried < tries:
            name, path = files[count.tried % len(files)]
            patient = dict(patients)[name]
            run = self.new_run(patient.variant)
            shutil.copytree(patient.folder, run.folder)
            how = self.hurt(run.folder / path)
            self.one_damage(run, patient, path, f"{how} in {path} of a {name} run", count)

    def one_damage(self, run: Run, patient: Run, path: Path, what: str, count: Count) -> None:
        checkpoints = contents(run.folder / "checkpoints")
        code = run.finish()
        text = run.said()
        count.tried += 1
        if code == 0:
            self.check(run, count, what)
            return
        count.refused += 1
        if code not in (1, 2) or "error: " not in text or "internal error" in text:
            count.fail(f"{what}: exit code {code}, {text[-600:]}")
            return
        if contents(run.folder / "checkpoints") != checkpoints:
            count.fail(f"{what}: refused, and yet the checkpoints were changed; {text[-300:]}")
            return
        shutil.copy(patient.folder / path, run.folder / path)
        code = run.finish()
        if code != 0:
            count.fail(f"{what}, put back: exit code {code}, {run.said()[-600:]}")
            return
        self.check(run, count, f"{what}, put back")

    def hurt(self, path: Path) -> str:
        content = path.read_bytes()
        if not content or self.random.random() < 0.25:
            size = self.random.choice([0, len(content) // 2, max(len(content) - 1, 0)])
            path.write_bytes(content[:size])
            return f"cut to {size} of {len(content)} bytes"
        place = self.random.randrange(len(content))
        bit = 1 << self.random.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        return f"bit {bit} at byte {place}"

    def patients(self) -> Iterator[tuple[str, Run]]:
        """Yield a run that was stopped inside its third epoch, and one that has finished."""
        variant = "saved at every step"
        self.reference(variant)
        stopped = self.new_run(variant)
        pid = stopped.start()
        while not list((stopped.folder / "checkpoints").glob("epoch_00002_at_*.json")):
            time.sleep(0.001)
        os.kill(pid, signal.SIGTERM)
        assert wait(pid) == 75, stopped.said()
        yield "stopped", stopped
        finished = self.new_run(variant)
        assert finished.finish() == 0, finished.said()
        yield "finished", finished

    def small_disk(self, count: Count) -> None:
        """Fill a real file system, where this user may mount one."""
        for pages in (30, 60, 90):
            variant = "gaba"
            self.reference(variant)
            with tmpfs(self.scratch / "small", pages * 4096) as place:
                if place is None:
                    return
                run = Run(place / "run", variant, self.config)
                run.stderr = self.scratch / "small.stderr"
                code = run.finish()
                text = run.said()
                count.tried += 1
                count.refused += code == 1
                if code not in (0, 1, 2) or "Traceback" in text or (code and "No space left" not in text):
                    count.fail(f"small disk of {pages} pages: exit code {code}, {text[-600:]}")
                    continue
                remount(place, 10_000 * 4096)
                code = run.finish()
                if code != 0:
                    count.fail(f"after a small disk: exit code {code}, {run.said()[-600:]}")
                    continue
                self.check(run, count, "small disk")


def wait_or_signal(pid: int, delay: float, signum: int) -> int:
    """Return the exit code of a process that gets a signal after ``delay`` seconds, if it still lives then."""
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(pid, signum)
    return wait(pid)


def all_files(folder: Path) -> list[Path]:
    """Return the files below a folder, relative to it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@contextmanager
def tmpfs(place: Path, size: int) -> Iterator[Path | None]:
    """Mount a file system of ``size`` bytes, or yield None."""
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, size: int) -> None:
    """Give a file system more room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


def main() -> int:
    """Do it; print and return what was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    for name, default in (("kills", 200), ("stops", 40), ("damages", 400), ("races", 20), ("disks", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    counts = {name: Count() for name in ("kills", "stops", "damages", "races", "disks", "small_disk")}
    memory = (
        "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    )  # a kill is no power cut: nothing need reach a disk
    with tempfile.TemporaryDirectory(prefix="torture-", dir=memory) as scratch:
        torture = Torture(Path(scratch), options.seed)
        torture.signals(counts["kills"], options.kills, [signal.SIGKILL])
        torture.signals(counts["stops"], options.stops, [signal.SIGTERM, signal.SIGINT])
        torture.damages(counts["damages"], options.damages)
        torture.races(counts["races"], options.races)
        torture.disks(counts["disks"], options.disks)
        if options.disks:
            torture.small_disk(counts["small_disk"])
    summary = {"seed": options.seed, "seconds": round(time.monotonic() - started, 1)}
    summary |= {name: asdict(count) for name, count in counts.items()}
    text = json.dumps(summary, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    return int(any(count.lost for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
