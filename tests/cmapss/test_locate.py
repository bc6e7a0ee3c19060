"""Which folder is read: what the user names is never replaced in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mtlbalance_cmapss.config import CmapssConfig
from mtlbalance_cmapss.dataset import build, load
from mtlbalance_cmapss.locate import cache_folder, find_nasa_files
from mtlbalance_cmapss.simulate import Fleet, write_fleet

from mtlbalance.errors import DataError


def test_data_dir_comes_before_the_variable_and_that_before_the_cache(
    no_files: Path, write_subset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_subset()
    other, cache = tmp_path / "other", no_files
    for folder in (other, cache):
        folder.mkdir(parents=True)
        for path in files.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    assert find_nasa_files(CmapssConfig()) == cache
    monkeypatch.setenv("MTLBALANCE_CMAPSS_DIR", str(other))
    assert find_nasa_files(CmapssConfig()) == other
    assert find_nasa_files(CmapssConfig(data_dir=files)) == files
    assert find_nasa_files(CmapssConfig(data_dir="")) == other


def test_empty_variables_count_as_unset(no_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_nasa_files(CmapssConfig()) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(no_files))
    assert cache_folder() == no_files / ".cache" / "mtlbalance" / "cmapss"


def test_the_folder_of_the_unpacked_archive_is_found(
    no_files: Path, write_subset: Callable[..., Path], tmp_path: Path
) -> None:
    inner = tmp_path / "CMAPSSData"
    write_subset().rename(inner)
    assert find_nasa_files(CmapssConfig(data_dir=tmp_path)) == inner


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_named_folder_without_the_subset_is_an_error(
    no_files: Path, write_subset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    folder = write_subset(subset="FD001")
    config = CmapssConfig(subset="FD003", data_dir=None if by_variable else folder)
    if by_variable:
        monkeypatch.setenv("MTLBALANCE_CMAPSS_DIR", str(folder))
    with pytest.raises(
        DataError, match=r"train_FD003\.txt, test_FD003\.txt, RUL_FD003\.txt not found"
    ) as caught:
        build(config)
    assert caught.value.exit_code == 2
    assert "source = 'simulated'" in str(caught.value)


def test_a_named_folder_that_does_not_exist_is_an_error(no_files: Path) -> None:
    with pytest.raises(DataError, match="/no/such/folder: no such folder"):
        build(CmapssConfig(data_dir=Path("/no/such/folder")))


def test_half_a_subset_in_the_cache_is_an_error(no_files: Path, write_subset: Callable[..., Path]) -> None:
    no_files.mkdir(parents=True)
    (no_files / "train_FD001.txt").write_bytes((write_subset() / "train_FD001.txt").read_bytes())
    with pytest.raises(DataError, match=r"test_FD001\.txt, RUL_FD001\.txt not found"):
        build(CmapssConfig())


def test_asking_for_nasa_files_never_simulates(no_files: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        build(CmapssConfig(source="nasa"))


def test_a_simulated_fleet_in_a_named_folder_is_recognised(no_files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    write_fleet(Fleet("FD001", 4, 0), folder)
    source = load(CmapssConfig(data_dir=folder))
    assert source.data_source == "simulated"
    assert "SIMULATED DATA" in source.notices[0]
    assert str(folder) in source.notices[0]
    with pytest.raises(DataError, match="holds a simulated fleet"):
        load(CmapssConfig(data_dir=folder, source="nasa"))


def test_source_simulated_ignores_the_files(no_files: Path, write_subset: Callable[..., Path]) -> None:
    source = load(CmapssConfig(data_dir=write_subset(), source="simulated", simulated_engines=4))
    assert source.data_source == "simulated"
    assert len(source.data.train.starts) == 4
