"""Whole sweeps as processes: crashes, time-outs, a driver that is killed, and what is left of them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtlbalance.cli.main import main
from mtlbalance.config import load_config
from mtlbalance.training import run_training
from mtlbalance.training.run_folder import open_run_folder

Write = Callable[[str], Path]
Start = Callable[..., "subprocess.Popen[str]"]

BEHAVIOURS = ["fine", "exits", "raises", "killed-once", "out-of-memory-once"]
SEEDS = """
    base = "study.toml"
    axes.seed = [{ run.seed = 1 }, { run.seed = 2 }, { run.seed = 3 }]
    """


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def events(run: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (run / "log.jsonl").read_text().splitlines()]


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return {key: value for key, value in found.items() if key not in ("wall_seconds", "run")}


def test_one_crash_never_touches_another(write: Write, start: Start) -> None:
    points = "".join(f"{{ dataset.behaviour = '{name}' }}, " for name in BEHAVIOURS)
    write(f"base = 'study.toml'\naxes.behaviour = [{points}]\n")
    process = start("sweep", "run", "sweep.toml", "--per-device", "2", "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 3, err
    document = json.loads(out)
    assert sorted(document["finished"]) == ["fine", "killed-once", "out-of-memory-once"]
    assert document["failed"].keys() == {"exits", "raises"}
    assert document["failed"]["exits"].startswith("exit code 7")
    assert document["failed"]["raises"].startswith(
        "exit code 2: dataset 'behaves' cannot say its tasks: ValueError: no such file, says the plugin (at "
    )
    assert "retry    killed-once" in err
    assert "killed by SIGKILL" in err
    assert "retry    out-of-memory-once" in err
    assert "started  killed-once on cpu, attempt 2" in err
    assert err.count("started  exits") == err.count("started  raises") == 1
    log = Path("runs/sweep/logs/killed-once.log").read_text()
    assert [line.split()[2] for line in log.splitlines() if line.startswith("---")] == ["1,", "2,"]

    # A run of a sweep is the run that its config alone gives.
    config = load_config("runs/sweep/configs/fine.toml", ["run.output_dir=alone"])
    alone = run_training(config, quiet=True).run_dir
    assert results(alone) == results(Path("runs/sweep/fine"))
    assert (alone / "model.safetensors").read_bytes() == Path(
        "runs/sweep/fine/model.safetensors"
    ).read_bytes()


def test_a_killed_driver_repeats_and_loses_nothing(write: Write, start: Start) -> None:
    write(SEEDS)
    folder = Path("runs/sweep")
    first, second, third = (folder / f"seed_{seed}" for seed in (1, 2, 3))
    run_training(load_config("study.toml", ["run.seed=1"]), out=first, quiet=True)
    Path("hold").touch()  # the second run stops after its first epoch, for as long as this is here
    driver = start("sweep", "run", "sweep.toml")
    wait_for(lambda: (second / "metrics.csv").exists())
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    before = (first / "results.json").stat().st_mtime_ns
    assert not third.exists()

    again = start("sweep", "run", "sweep.toml")
    assert again.stderr is not None
    lines = [again.stderr.readline(), again.stderr.readline()]
    assert lines[0].startswith("sweep: 2 of 3 runs to do, 1 finished before")
    assert lines[1].startswith("locked   seed_2: another process is at it")
    time.sleep(0.5)
    assert not third.exists()  # the run that was left behind takes up the only slot
    Path("hold").unlink()
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert out.splitlines()[0] == "sweep: of 3 runs: 2 finished, 1 finished before; in runs/sweep"
    assert (first / "results.json").stat().st_mtime_ns == before
    for run in (first, second, third):
        assert events(run).count("started") == 1, "a run was repeated"
        assert events(run).count("resumed") == 0
        assert events(run)[-1] == "finished"

    once_more = start("sweep", "run", "sweep.toml", "--json")
    out, err = once_more.communicate(timeout=60)
    assert (once_more.returncode, json.loads(out)["skipped"]) == (0, ["seed_1", "seed_2", "seed_3"])
    assert "started" not in err


def test_a_stopped_driver_stops_its_runs_in_order(write: Write, start: Start) -> None:
    write("base = 'study.toml'\naxes.seed = [{ run.seed = 1 }]\n")
    endless = ["training.epochs=100000", "training.patience=100000"]
    driver = start("sweep", "run", "sweep.toml", *endless)
    run = Path("runs/sweep/seed_1")
    wait_for((run / "metrics.csv").exists)
    driver.send_signal(signal.SIGTERM)
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 75, err
    assert "stopping: 1 at work, asked to leave their folders in order" in err
    assert out.splitlines()[0] == "sweep: of 1 runs: 0 finished, 1 left; in runs/sweep"
    assert events(run)[-1] == "interrupted"


def test_a_run_that_takes_too_long_is_stopped(write: Write, start: Start) -> None:
    write("base = 'study.toml'\naxes.behaviour = [{ dataset.behaviour = 'hangs' }]\n")
    process = start("sweep", "run", "sweep.toml", "--timeout", "0.5", "--quiet")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert err == ""
    assert "failed hangs: timed out after" in out
    assert "the same command goes on with what is not finished" in out


def test_a_finished_run_of_another_config_is_not_passed_off(
    write: Write, capfd: Any, monkeypatch: Any
) -> None:
    write("base = 'study.toml'\naxes.seed = [{ run.seed = 1 }]\n")
    run_training(load_config("study.toml", ["run.seed=1"]), out=Path("runs/sweep/seed_1"), quiet=True)
    assert main(["sweep", "run", "sweep.toml", "--quiet"]) == 0  # the same config: finished, and skipped
    capfd.readouterr()
    assert main(["sweep", "run", "sweep.toml", "training.epochs=5"]) == 2
    err = capfd.readouterr().err
    assert "error: 1 of 1 runs in runs/sweep were trained with another config; of seed_1" in err
    assert "  training.epochs: 2 -> 5\n" in err
    assert main(["sweep", "run", "sweep.toml", "training.epochs=5", "--dry-run"]) == 0
    assert (
        "warning: seed_1 was trained with another config: training.epochs: 2 -> 5" in capfd.readouterr().err
    )


def test_results_that_are_damaged_are_made_again(write: Write, capfd: Any) -> None:
    write("base = 'study.toml'\naxes.seed = [{ run.seed = 1 }]\n")
    run = run_training(
        load_config("study.toml", ["run.seed=1"]), out=Path("runs/sweep/seed_1"), quiet=True
    ).run_dir
    before = (run / "results.json").read_bytes()
    (run / "results.json").write_bytes(before.replace(b'"best_epoch": 1', b'"best_epoch": 9'))
    assert (run / "results.json").read_bytes() != before
    assert main(["report", str(run)]) == 2
    assert "results.json is not what sums.json says it was" in capfd.readouterr().err
    assert main(["sweep", "run", "sweep.toml", "--json", "--quiet"]) == 0
    assert json.loads(capfd.readouterr().out)["finished"] == ["seed_1"]
    assert results(run) == {
        key: value for key, value in json.loads(before).items() if key not in ("wall_seconds", "run")
    }


def test_status_tells_the_states_apart(write: Write, capfd: Any) -> None:
    write(SEEDS)
    folder = Path("runs/sweep")
    assert main(["sweep", "status", str(folder)]) == 2
    assert "error: runs/sweep is not the folder of a sweep" in capfd.readouterr().err
    from mtlbalance.sweeps import make_plan
    from mtlbalance.sweeps.supervisor import prepare

    prepare(make_plan(Path("sweep.toml")))
    run_training(load_config("study.toml", ["run.seed=1"]), out=folder / "seed_1", quiet=True)
    (folder / "seed_3" / "checkpoints").mkdir(parents=True)
    capfd.readouterr()
    with open_run_folder(folder / "seed_2"):
        assert main(["sweep", "status", str(folder)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["1", "finished"], ["2", "locked"], ["3", "broken"]]
    assert lines[-1] == "3 runs: 1 finished, 1 locked, 1 broken; in runs/sweep"


LEASHED = """\
import sys
from pathlib import Path
from mtlbalance.sweeps import Job, run_job

run_job(Job("seed_2", Path("study.toml").read_text(), Path("config.toml"), Path("seed_2"), Path("log")))
"""


def test_a_run_stops_in_order_when_its_worker_is_killed(write: Write) -> None:
    write("")
    Path("study.toml").write_text(Path("study.toml").read_text().replace("epochs = 2", "epochs = 100000"))
    worker = subprocess.Popen([sys.executable, "-c", LEASHED])
    run = Path("seed_2")
    wait_for((run / "metrics.csv").exists)
    worker.send_signal(signal.SIGKILL)
    worker.wait(timeout=60)
    wait_for(lambda: events(run)[-1] == "interrupted")
    wait_for(lambda: "pre-empted; the run goes on when it is started again" in Path("log").read_text())
    assert list((run / "checkpoints").glob("epoch_*.json"))


IGNORES = """\
import signal, threading, time
from mtlbalance.cli import leash

leash._GRACE_SECONDS = 0.2
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=leash._wait_for_the_end_of_input, daemon=True).start()
time.sleep(600)
"""


def test_a_run_that_does_not_stop_when_its_worker_is_gone_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", IGNORES], stdin=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == -signal.SIGKILL


def test_what_cannot_be_started_or_told_stops_no_other_run(write: Write, start: Start) -> None:
    write("base = 'study.toml'\naxes.seed = [{ run.seed = 1 }, { run.seed = 2 }]\n")
    Path("runs/sweep/logs/seed_1.log").mkdir(parents=True)
    driver = start("sweep", "run", "sweep.toml", "--json")
    assert driver.stderr is not None
    assert driver.stdout is not None
    driver.stderr.close()  # as in `... 2>&1 | head`: each event is then a broken pipe
    document = json.loads(driver.stdout.read())
    driver.stdout.close()
    assert driver.wait(timeout=60) == 3
    assert document["finished"] == ["seed_2"]
    assert document["failed"]["seed_1"].startswith("it cannot be started: [Errno 21] Is a directory")


def test_a_run_that_another_process_finishes_with_another_config_is_not_passed_off(
    write: Write, start: Start, tmp_path: Path
) -> None:
    """As after a driver that was killed, and an edit of the base config, while its runs go on."""
    write("base = 'study.toml'\naxes.seed = [{ run.seed = 1 }]\n")
    folder = Path("runs/sweep/seed_1")
    with open_run_folder(folder):
        driver = start("sweep", "run", "sweep.toml", "--json")
        assert driver.stderr is not None
        while "locked" not in driver.stderr.readline():
            pass
        other = run_training(load_config("study.toml", ["run.seed=1", "training.lr=0.5"]), quiet=True)
        shutil.copytree(other.run_dir, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 3, err
    assert json.loads(out)["failed"] == {
        "seed_1": "another process has finished it with another config: training.lr: 0.5 -> 0.001"
    }
