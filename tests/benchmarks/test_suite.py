"""`make bench` gives every script a command line that it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_of_the_suite_is_understood(script: Script, quick: bool) -> None:
    commands = script("suite").commands(quick=quick, libmtl=None)
    assert {"memory", "steps_mlp", "end_to_end", "scaling", "import_time"} <= set(commands)
    for name, (file, *arguments) in commands.items():
        module = script(Path(file).stem)
        assert module.parse_arguments([*arguments, "--out", f"{name}.json"]).out == Path(f"{name}.json")


def test_figures_go_to_a_folder_named_after_the_machine_but_not_by_its_name(script: Script) -> None:
    import socket

    folder = script("suite").results_folder(quick=False)
    assert folder.parent.name == "results"
    assert socket.gethostname().lower() not in folder.name.removeprefix("20").split("-")
    assert folder.name == folder.name.lower()
