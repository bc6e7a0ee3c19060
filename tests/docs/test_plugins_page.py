"""The page on writing a plugin does what it says."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

from mtlbalance import Balancer
from mtlbalance.cli.main import main

pytestmark = pytest.mark.usefixtures("clean_imports")
PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    assert found
    return found


def test_its_commands_work_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks("console")).splitlines():
        program, *arguments = shlex.split(line.removeprefix("$ "))
        if program == "cd":
            monkeypatch.chdir(arguments[0])
        else:
            assert program == "mtlbalance"
            assert main(arguments) == 0, line
    assert list(Path.cwd().rglob("results.json"))


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file, so that what it defines can be pickled."""
    (tmp_path / "plugins_page.py").write_text("\n\n".join(blocks("python")), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import plugins_page  # type: ignore[import-not-found]

    assert issubclass(plugins_page.MeanLoss, Balancer)


def test_its_table_of_facts_has_the_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", PAGE, flags=re.MULTILINE)
    assert len(rows) >= 10
    members = dict(inspect.getmembers(Balancer))
    assert {name: eval(default) for name, default in rows} == {name: members[name] for name, _ in rows}
