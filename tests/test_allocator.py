"""Memory that is freed stays with the process, where that was asked for."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

# Blocks above the largest threshold that glibc comes to by itself, so that they would never stay.
TAKE_AND_FREE = """
import resource


def faults(count, size=48_000_000):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        bytearray(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


faults(1)
print(faults(20))
"""


def faults_after(first: str, *arguments: str) -> int:
    command = [sys.executable, "-c", first + TAKE_AND_FREE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain() -> int:
    return faults_after("")


def test_freed_blocks_are_not_faulted_in_again(plain):
    kept = faults_after("from mtlbalance import keep_freed_memory\nassert keep_freed_memory()\n")
    assert kept < plain / 10, (plain, kept)


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_keeps_memory_where_its_config_says_so(asked, plain, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[dataset]\nname = "toy"\n[backbone]\nname = "mlp"\n[balancer]\nname = "fixed"\n'
        f'[training]\nepochs = 1\n[run]\ndevice = "cpu"\nkeep_freed_memory = {str(asked).lower()}\n'
        f'output_dir = "{tmp_path.as_posix()}"\n'
    )
    run = (
        "import sys\nfrom mtlbalance.config import load_config\nfrom mtlbalance.training.run import run_training\n"
        "run_training(load_config(sys.argv[1]), quiet=True)\n"
    )
    assert (faults_after(run, str(path)) < plain / 10) is asked
