"""The parts of on_gpu.py: what each one runs, and the lines that it adds to the table."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import peer_torchjd
from gpu_runs import study_run, study_table
from gpu_turns import ROOT, Lines, Part, Setting, Turn, environment

HERE = Path(__file__).resolve().parent
CUDA_TESTS = ("tests/balancers/test_cuda.py", "tests/balancers/test_cuda_graphs.py")


# ---------------------------------------------------------------------- the scripts of this folder
@dataclass(frozen=True)
class Script:
    """A turn of one of the benchmark scripts.

    Args:
        name: of its files.
        full, quick: script and arguments; PEERS stands for those that are installed.
        lines: reads its JSON file for the table.
    """

    name: str
    full: str
    quick: str
    lines: Callable[[dict[str, Any]], Lines]

    def words(self, setting: Setting) -> list[str]:
        """Return script and arguments."""
        peers = "--peers torchjd" if peer_torchjd.INSTALLED else ""
        words = (self.quick if setting.quick else self.full).replace("PEERS", peers).split()
        return [*words, "--device", setting.device, "--out", str(self.figures(setting))]

    def figures(self, setting: Setting) -> Path:
        """Return where the script writes its figures."""
        return setting.out / f"{self.name}.json"

    def __call__(self, setting: Setting, seconds: float) -> Turn:
        """Run the script; on a GPU in a process of its own, as an error there ends all that a process can do."""
        file, *words = self.words(setting)
        with (setting.out / f"{self.name}.log").open("w", encoding="utf-8") as log:
            if setting.on_cuda:
                command = [sys.executable, str(HERE / file), *words]
                code = subprocess.run(
                    command, env=environment(), stdout=log, stderr=log, timeout=seconds, check=False
                ).returncode
                if code:
                    return Turn("failed", [], f"exit code {code}, see {self.name}.log")
            else:
                with redirect_stdout(log):
                    importlib.import_module(Path(file).stem).main(words)
        return Turn("done", self.lines(json.loads(self.figures(setting).read_text(encoding="utf-8"))))


def step_lines(figures: dict[str, Any]) -> Lines:
    """Return a line a workload: ratios to the plain sum."""
    found = []
    for result in figures["results"]:
        ratios = [
            f"{row['name'].removeprefix('mtlbalance ')} {row['ratio']['median']:.2f}"
            for row in result["variants"]
            if "ratio" in row and row["name"] != "plain sum"
        ]
        plain = f"plain sum {1000 * result['plain_seconds']:.2f} ms"
        found.append((result["workload"], " · ".join([plain, *ratios])))
    return found


def memory_lines(figures: dict[str, Any]) -> Lines:
    """Return a line a workload: copies of the trunk's gradients at the peak, beyond the plain sum's."""
    return [
        (
            result["workload"],
            "copies at the peak: "
            + " · ".join(
                f"{row['name'].removeprefix('mtlbalance ')} {row['peak_copies']:.2f}"
                for row in result["variants"]
                if "peak_copies" in row and row["source"] != "floor"
            ),
        )
        for result in figures["results"]
    ]


def ladder_lines(figures: dict[str, Any]) -> Lines:
    """Return a line a rung: samples a second by method, and what they cost beside fixed weights."""
    rungs: dict[str, list[str]] = {}
    for row in figures["ladder"]:
        if "failure" in row:
            rungs.setdefault(row["rung"], []).append(f"{row['method']}: {row['failure'][:60]}")
            continue
        to_fixed = f"{row['to_fixed']['median']:.2f} of fixed" if row["to_fixed"] else ""
        gain = f"gain {row['gain']['median']:.2f}" if "gain" in row else ""
        notes = ", ".join(filter(None, (to_fixed, gain)))
        said = f"{row['method']} {row['samples_per_second']:,} ({notes})"
        rungs.setdefault(row["rung"], []).append(said)
    skipped = [(rung, "skipped: needs CUDA") for rung in figures["needs_cuda"]]
    return [*((rung, " · ".join(said)) for rung, said in rungs.items()), *skipped]


def packed_lines(figures: dict[str, Any]) -> Lines:
    """Return one line: samples a second by the number of processes."""
    said = [f"{row['processes']}: {row['samples_per_second']:,} ({row['rung']})" for row in figures["packed"]]
    return [("processes: samples a second, together", " · ".join(said))]


# ---------------------------------------------------------------------- the tests
def cuda_tests(setting: Setting, seconds: float) -> Turn:
    """Run the tests that need a GPU, in a process of its own."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        return Turn("skipped", [], f"{' and '.join(missing)} not installed")
    report = setting.out / "tests.xml"
    report.unlink(missing_ok=True)
    words = ["-q", "-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={report}", *CUDA_TESTS]
    if find_spec("xdist") is not None:
        words += ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]
    with (setting.out / "tests.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "pytest", *words]
        subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=log, stderr=log, timeout=seconds, check=False
        )
    if not report.exists():
        return Turn("failed", [], "no test was run, see tests.log")
    return test_turn(report)


def test_turn(report: Path) -> Turn:
    """Read pytest's report; tests that fail are a finding, and named."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    counts = [
        {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        for suite in suites
    ]
    tests, failures, errors, skipped = (sum(each[key] for each in counts) for key in counts[0])
    bad = [
        str(case.get("name"))
        for case in ElementTree.parse(report).getroot().iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = tests - failures - errors - skipped
    said = f"passed {passed}, failed {failures + errors}, skipped {skipped}"
    return Turn("done", [("GPU-marked tests", said)], ", ".join(bad[:5]))


_STEPS = "--methods fixed gaba pcgrad --batched PEERS"
_SMALL = "--rounds 1 1 --slice-seconds 0.0001 --batch-size 4 --methods gaba"

# In this order.
PARTS = (
    Part("tests", cuda_tests, 240, 90, needs_cuda=True),
    Part("run_paper", study_run("run_paper", "fd002_gaba.toml"), 90, 60),
    Part(
        "steps_study",
        Script(
            "steps_study",
            f"balancer_step.py --models study --rounds 5 30 --seconds 20 --slice-seconds 0.1 {_STEPS}",
            f"balancer_step.py --models study --hidden-size 8 {_SMALL}",
            step_lines,
        ),
        90,
        50,
    ),
    Part(
        "steps_mlp",
        Script(
            "steps_mlp",
            f"balancer_step.py --models mlp --tasks 4 8 16 --rounds 5 40 --seconds 8 {_STEPS}",
            f"balancer_step.py --models mlp --tasks 2 --width 8 {_SMALL}",
            step_lines,
        ),
        90,
        60,
    ),
    Part(
        "steps_resnet",
        Script(
            "steps_resnet",
            f"balancer_step.py --models resnet --rounds 5 30 --seconds 10 {_STEPS}",
            f"balancer_step.py --models resnet --channels 2 {_SMALL}",
            step_lines,
        ),
        60,
        40,
    ),
    Part(
        "memory",
        Script(
            "memory",
            "balancer_memory.py --layers conv --tasks 2 4 8 16 --methods gaba pcgrad graddrop --batched PEERS",
            "balancer_memory.py --layers conv --tasks 2 --width 16 --methods gaba",
            memory_lines,
        ),
        60,
        40,
    ),
    Part(
        "ladder",
        Script(
            "ladder",
            "throughput.py --only ladder --seconds 40",
            "throughput.py --only ladder --hidden-size 8 --batch-size 4 --samples 16 --workers 0 --rounds 1 1 "
            "--slice-seconds 0.0001 --seconds 1",
            ladder_lines,
        ),
        150,
        90,
    ),
    Part(
        "ladder_mlp",
        Script(
            "ladder_mlp",
            "throughput.py --only ladder --model mlp --tasks 8 --seconds 30",
            "throughput.py --only ladder --model mlp --tasks 2 --hidden-size 8 --batch-size 4 --samples 16 "
            "--workers 0 --rounds 1 1 --slice-seconds 0.0001 --seconds 1",
            ladder_lines,
        ),
        120,
        70,
    ),
    Part(
        "packed",
        Script(
            "packed",
            "throughput.py --only packed --processes 1 2 4 8",
            "throughput.py --only packed --hidden-size 8 --processes 1 2 --packed-seconds 1",
            packed_lines,
        ),
        180,
        120,
        needs_cuda=True,
    ),
    Part("run_honest", study_run("run_honest", "fd002_gaba_honest.toml"), 90, 60),
    Part("table", study_table, 600, 120, needs_cuda=True),
)
