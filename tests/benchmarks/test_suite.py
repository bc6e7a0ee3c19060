"""`make bench` gives every script a command line that it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_command_of_the_suite_is_understood(script: Script, quick: bool, device: str) -> None:
    commands = script("suite").commands(quick=quick, libmtl=None, device=device)
    assert {"memory", "steps_mlp", "end_to_end", "scaling"} <= set(commands)
    assert ("import_time" in commands) == (device == "cpu")
    for name, (file, *arguments) in commands.items():
        module = script(Path(file).stem)
        assert module.parse_arguments([*arguments, "--out", f"{name}.json"]).out == Path(f"{name}.json")


def test_figures_go_to_a_folder_named_after_the_machine_but_not_by_its_name(script: Script) -> None:
    import socket

    folder = script("suite").results_folder(quick=False)
    assert folder.parent.name == "results"
    assert socket.gethostname().lower() not in folder.name.removeprefix("20").split("-")
    assert folder.name == folder.name.lower()


def test_a_page_is_written_from_what_was_measured(script: Script, tmp_path: Path) -> None:
    """Two small parts of a suite; the page has their numbers, judges the targets, and says where plots are missing."""
    folder = tmp_path / "2026-01-02-a-machine"
    sizes = ["--width", "16", "--tasks", "2", "4"]
    steps = ["--models", "mlp-heads", "--rounds", "1", "1", "--slice-seconds", "0.0001", "--batch-size", "4"]
    few = ["--methods", "fixed", "gaba", "pcgrad"]
    script("balancer_step").main([*steps, *sizes, *few, "--out", str(folder / "steps_mlp.json")])
    script("balancer_memory").main([*sizes, *few, "--out", str(folder / "memory.json")])
    page = script("page")
    assert page.main([str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("# 2026-01-02-a-machine\n")
    assert "| measured (target) | mlp, K = 2 | mlp, K = 4 |" in text
    assert "| pcgrad to exact gaba |" in text
    assert "| **fixed** |" in text
    figures = json.loads((folder / "steps_mlp.json").read_text())["results"][0]
    gaba = next(row for row in figures["variants"] if row["name"] == "mtlbalance gaba")["ratio"]
    assert f"{gaba['median']:.2f} ({gaba['low']:.2f}-{gaba['high']:.2f})" in text
    pictures = sorted(path.name for path in folder.glob("*.png"))
    if find_spec("matplotlib"):
        assert pictures == ["memory.png", "methods.png", "models.png", "steps_by_tasks.png"]
        assert all(f"({name})" in text for name in pictures)
    else:
        assert pictures == []
        assert page.NO_PLOTS in text


def test_a_folder_without_figures_has_no_page(script: Script, tmp_path: Path, capsys) -> None:
    assert script("page").main([str(tmp_path)]) == 2
    assert "there are no figures" in capsys.readouterr().err


def test_several_processes_are_pooled_by_their_medians(script: Script, tmp_path: Path) -> None:
    pooled = script("measuring").pooled_ratio
    baseline = [[1.0, 2.0, 4.0], [1.0], [2.0, 2.0]]
    seconds = [[1.1, 2.2, 4.4], [1.5], [2.4, 2.4]]  # ratios 1.1, 1.5 and 1.2, whatever the number of rounds
    ratio = pooled(seconds, baseline)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.1, 1.2, 1.5))
    out = tmp_path / "steps.json"
    steps = ["--models", "mlp-heads", "--rounds", "1", "1", "--slice-seconds", "0.0001", "--batch-size", "4"]
    few = ["--width", "16", "--tasks", "2", "--methods", "fixed", "gaba", "--processes", "2"]
    script("balancer_step").main([*steps, *few, "--out", str(out)])
    (result,) = json.loads(out.read_text())["results"]
    rows = {row["name"]: row for row in result["variants"]}
    of_processes = rows["mtlbalance fixed"]["seconds_per_step"]
    plain = rows["plain sum"]["seconds_per_step"]
    assert [len(seconds) for seconds in of_processes] == [1, 1]
    ratios = [one[0] / base[0] for one, base in zip(of_processes, plain, strict=True)]
    assert rows["mtlbalance fixed"]["ratio"]["median"] == pytest.approx(sum(ratios) / 2, rel=1e-3)
