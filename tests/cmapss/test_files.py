"""Reading NASA's text files: every fault names its file and line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mtlbalance_cmapss.checksums import KNOWN_SHA256, differing_files, sha256_of
from mtlbalance_cmapss.config import SUBSETS, CmapssConfig
from mtlbalance_cmapss.dataset import build
from mtlbalance_cmapss.files import file_names, read_subset, read_trajectories

from mtlbalance.errors import DataError


def test_columns_land_where_they_belong(write_subset: Callable[..., Path]) -> None:
    folder = write_subset()
    data = read_subset(folder, "FD001")
    raw = np.loadtxt(folder / "train_FD001.txt")
    assert data.train.unit.tolist() == [1] * 8 + [2] * 6
    assert data.train.cycle.tolist() == [*range(1, 9), *range(1, 7)]
    np.testing.assert_array_equal(data.train.settings, raw[:, 2:5])
    np.testing.assert_array_equal(data.train.sensors, raw[:, 5:])
    assert data.train.starts.tolist() == [0, 8]
    assert data.train.lengths.tolist() == [8, 6]
    assert data.test_rul_cycles.tolist() == [10, 200]


def test_trailing_blanks_blank_lines_and_windows_line_ends_are_no_fault(
    write_subset: Callable[..., Path],
) -> None:
    path = write_subset() / "train_FD001.txt"
    expected = read_trajectories(path)
    text = path.read_text().replace("\n", "  \r\n")
    path.write_bytes(b"\r\n" + text.encode() + b"\r\n \r\n")
    got = read_trajectories(path)
    np.testing.assert_array_equal(got.sensors, expected.sensors)
    np.testing.assert_array_equal(got.cycle, expected.cycle)


def _drop_fields(line: str) -> str:
    return " ".join(line.split()[:11])


def _field(column: int, value: str) -> Callable[[str], str]:
    def edit(line: str) -> str:
        fields = line.split()
        fields[column - 1] = value
        return " ".join(fields)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop_fields, "11 columns instead of 26"),
        (lambda line: line + " 1.0", "27 columns instead of 26"),
        (_field(7, "oops"), "column 7 holds 'oops', not a number"),
        (_field(9, "nan"), "column 9 holds 'nan', not a finite number"),
        (_field(9, "inf"), "column 9 holds 'inf', not a finite number"),
        (_field(2, "5"), "unit 1 has cycle 5 where 4 is expected"),
        (_field(2, "3"), "unit 1 has cycle 3 where 4 is expected"),
        (_field(2, "3.5"), "unit 1 has cycle 3.5 where 4 is expected"),
        (_field(1, "3"), "unit 3 follows unit 1"),
        (_field(1, "2"), "unit 2 has cycle 4 where 1 is expected"),
        (lambda line: "\x00\xff binary", "2 columns instead of 26"),
    ],
)
def test_a_bad_line_is_named(
    write_subset: Callable[..., Path], edit: Callable[[str], str], message: str
) -> None:
    path = write_subset() / "train_FD001.txt"
    lines = path.read_text().splitlines()
    lines[3] = edit(lines[3])
    # A blank line before it must not shift the count.
    path.write_text("\n".join(["", *lines]), encoding="latin-1")
    with pytest.raises(DataError) as caught:
        read_trajectories(path)
    assert f"{path}:5: " in str(caught.value)
    assert message in str(caught.value)


def test_a_file_cut_in_the_middle_of_its_last_line_is_named(write_subset: Callable[..., Path]) -> None:
    path = write_subset() / "test_FD001.txt"
    text = path.read_text().rstrip()
    path.write_text(text[: len(text) - 40])
    with pytest.raises(
        DataError, match=r"test_FD001\.txt:8: \d+ columns instead of 26; the file is truncated"
    ):
        read_subset(path.parent, "FD001")


def test_a_file_that_lost_its_first_engine_is_named(write_subset: Callable[..., Path]) -> None:
    path = write_subset() / "train_FD001.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[8:]))
    with pytest.raises(DataError, match=r"train_FD001\.txt:1: unit 2 follows the start of the file"):
        read_trajectories(path)


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_is_named(write_subset: Callable[..., Path], content: str) -> None:
    path = write_subset() / "train_FD001.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=r"train_FD001\.txt:1: the file is empty"):
        read_trajectories(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("10\n", r"RUL_FD001\.txt:1: the file has 1 remaining lives, but test_FD001\.txt has 2 engines"),
        ("10\n20\n30\n", r"RUL_FD001\.txt:3: the file has 3 remaining lives"),
        ("10\n-1\n", r"RUL_FD001\.txt:2: remaining life -1 is negative"),
        ("10\n1 2\n", r"RUL_FD001\.txt:2: 2 columns instead of 1"),
        ("10\nten\n", r"RUL_FD001\.txt:2: column 1 holds 'ten', not a number"),
    ],
)
def test_a_bad_rul_file_is_named(write_subset: Callable[..., Path], content: str, message: str) -> None:
    folder = write_subset()
    (folder / "RUL_FD001.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        read_subset(folder, "FD001")


def test_a_missing_file_is_named(write_subset: Callable[..., Path]) -> None:
    folder = write_subset()
    (folder / "test_FD001.txt").unlink()
    with pytest.raises(DataError, match=r"test_FD001\.txt: no such file"):
        read_subset(folder, "FD001")


def test_altered_files_give_a_notice_and_are_not_comparable(write_subset: Callable[..., Path]) -> None:
    folder = write_subset()
    data = build(CmapssConfig(subset="FD001", data_dir=folder, window=4))
    assert any("differ from NASA's files" in notice for notice in data.notices)
    assert data.data_source == "nasa"
    assert data.facts["official_files"] is False
    assert data.facts["comparable_with_published"] is False


def test_line_ends_do_not_change_a_checksum(tmp_path: Path) -> None:
    (tmp_path / "unix").write_bytes(b"1 2\n3 4\n")
    (tmp_path / "windows").write_bytes(b"1 2\r\n3 4\r\n")
    assert sha256_of(tmp_path / "unix") == sha256_of(tmp_path / "windows")
    assert len({*KNOWN_SHA256.values()}) == 12
    assert {name for subset in SUBSETS for name in file_names(subset)} == set(KNOWN_SHA256)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("subset", "rows", "engines"),
    [
        ("FD001", (20631, 13096), (100, 100)),
        ("FD002", (53759, 33991), (260, 259)),
        ("FD003", (24720, 16596), (100, 100)),
        ("FD004", (61249, 41214), (249, 248)),
    ],
)
def test_nasa_files(nasa_folder: Path, subset: str, rows: tuple[int, int], engines: tuple[int, int]) -> None:
    data = read_subset(nasa_folder, subset)  # type: ignore[arg-type]
    assert (len(data.train), len(data.test)) == rows
    assert (len(data.train.starts), len(data.test.starts)) == engines
    assert differing_files(nasa_folder, subset) == []  # type: ignore[arg-type]


def test_text_is_parsed_once_for_the_same_content(
    write_subset: Callable[..., Path], no_files: Path, tmp_path: Path
) -> None:
    folder = write_subset()
    first = read_subset(folder, "FD001")
    kept = no_files.parent / "prepared"
    assert len(list(kept.glob("cmapss-FD001-*.npz"))) == 1
    copy = tmp_path / "copy"
    folder.rename(copy)
    again = read_subset(copy, "FD001")  # elsewhere, and with the same content
    assert again.train.path == copy / "train_FD001.txt"
    for part in ("train", "test"):
        for name in ("unit", "cycle", "settings", "sensors"):
            before, now = (getattr(getattr(data, part), name) for data in (first, again))
            assert before.dtype == now.dtype
            np.testing.assert_array_equal(before, now)
    np.testing.assert_array_equal(first.test_rul_cycles, again.test_rul_cycles)
    assert len(list(kept.glob("*.npz"))) == 1
    path = copy / "RUL_FD001.txt"
    path.write_text(path.read_text().replace("200", "199"))
    assert read_subset(copy, "FD001").test_rul_cycles.max() == 199
    assert len(list(kept.glob("*.npz"))) == 2


def test_kept_numbers_need_no_pandas(write_subset: Callable[..., Path], no_files: Path) -> None:
    folder = write_subset()
    program = (
        "import sys; from pathlib import Path; from mtlbalance_cmapss.files import read_subset;"
        "read_subset(Path(sys.argv[1]), 'FD001'); print('pandas' in sys.modules)"
    )
    for expected in ("True", "False"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            cwd=Path(__file__).parents[2] / "examples" / "cmapss",
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert done.stdout.strip() == expected
