"""What is measured on a GPU: on a CPU the parts that can run do, the others say that they need one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from mtlbalance.cli.main import main as mtlbalance

Script = Callable[[str], ModuleType]


def test_the_quick_form_does_what_a_cpu_can_and_the_next_call_goes_on(
    script: Script, tmp_path: Path, capsys
) -> None:
    on_gpu = script("on_gpu")
    words = ["--device", "cpu", "--quick", "--out", str(tmp_path)]
    first = ["tests", "run_paper", "steps_mlp", "table"]
    assert on_gpu.main([*words, "--only", *first]) == 0
    notes = json.loads((tmp_path / "on_gpu.json").read_text())["parts"]
    assert {name: found["state"] for name, found in notes.items()} == {
        "tests": "skipped",
        "run_paper": "done",
        "steps_mlp": "done",
        "table": "skipped",
    }
    printed = capsys.readouterr().out
    assert "| tests |  | skipped: needs CUDA |" in printed
    assert "2 epochs, " in printed
    assert "gaba (features) " in printed

    assert on_gpu.main(words) == 0
    later = json.loads((tmp_path / "on_gpu.json").read_text())["parts"]
    assert {name for name, found in later.items() if found["state"] == "skipped"} == {
        "tests",
        "packed",
        "table",
    }
    assert {name for name, found in later.items() if found["state"] == "done"} == {
        *(
            "run_paper",
            "run_honest",
            "steps_study",
            "steps_mlp",
            "steps_resnet",
            "memory",
            "ladder",
            "ladder_mlp",
        ),
    }
    assert all(later[name] == notes[name] for name in ("run_paper", "steps_mlp"))
    printed = capsys.readouterr().out
    assert "| ladder | CUDA graph | skipped: needs CUDA |" in printed
    assert "| ladder | batches on the device | fixed " in printed
    assert "steps_mlp: done" not in printed  # done before
    figures = json.loads((tmp_path / "ladder.json").read_text())
    assert [row["rung"] for row in figures["ladder"] if row["method"] == "gaba"] == [
        "DataLoader",
        "batches on the device",
        "fused AdamW",
    ]


@pytest.mark.parametrize("quick", [False, True])
def test_every_script_understands_its_arguments(script: Script, tmp_path: Path, quick: bool) -> None:
    parts = script("gpu_parts")
    setting = parts.Setting("cuda", quick, tmp_path)
    scripts = [part.take for part in parts.PARTS if isinstance(part.take, parts.Script)]
    assert len(scripts) >= 6
    for each in scripts:
        file, *words = each.words(setting)
        arguments = script(Path(file).stem).parse_arguments(words)
        assert str(arguments.device) == "cuda"
        assert arguments.out == tmp_path / f"{each.name}.json"


def test_the_table_is_a_sound_sweep(capsys) -> None:
    sweep = Path(__file__).parents[2] / "benchmarks" / "gpu_table.toml"
    assert mtlbalance(["sweep", "run", str(sweep), "--dry-run"]) == 0
    assert "= 60 runs" in capsys.readouterr().out


def test_tests_that_fail_are_named(script: Script, tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1">'
        '<testcase name="test_a"/><testcase name="test_b"><failure/></testcase>'
        '<testcase name="test_c"><error/></testcase></testsuite></testsuites>'
    )
    turn = script("gpu_parts").test_turn(report)
    assert turn.lines == [("GPU-marked tests", "passed 2, failed 2, skipped 1")]
    assert turn.note == "test_b, test_c"


def test_a_part_that_fails_is_noted_and_tried_again_and_the_others_have_their_turns(
    script: Script, tmp_path: Path, capsys, monkeypatch
) -> None:
    on_gpu, parts = script("on_gpu"), script("gpu_parts")
    outcomes = iter([MemoryError("too\nlarge"), None])

    def fails_at_first(setting, seconds):
        if (error := next(outcomes)) is not None:
            raise error
        return parts.Turn("done", [("it", "fits")])

    works = parts.Part("works", lambda setting, seconds: parts.Turn("done", [("as", "ever")]), 1, 0)
    monkeypatch.setattr(on_gpu, "PARTS", (parts.Part("large", fails_at_first, 1, 0), works))
    words = ["--device", "cpu", "--out", str(tmp_path)]
    assert on_gpu.main(words) == 1
    printed = capsys.readouterr().out
    assert "| large |  | failed: MemoryError: too |" in printed
    assert "| works | as | ever |" in printed
    assert on_gpu.main(words) == 0
    assert "| large | it | fits |" in capsys.readouterr().out
