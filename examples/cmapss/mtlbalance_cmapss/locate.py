"""Where the text files are: a folder named by the user, the cache folder, or a simulated fleet."""

from __future__ import annotations

import os
from pathlib import Path

from mtlbalance.caching import cache_root
from mtlbalance.errors import DataError

from .config import CmapssConfig, Subset
from .files import file_names

DATA_DIR_VARIABLE = "MTLBALANCE_CMAPSS_DIR"
REPOSITORY_URL = (
    "https://www.nasa.gov/intelligent-systems-division/discovery-and-systems-health/pcoe/"
    "pcoe-data-set-repository/"
)
HOW_TO_GET = (
    f"download 'Turbofan Engine Degradation Simulation' from {REPOSITORY_URL} and run 'mtlbalance-cmapss fetch "
    f"--from ARCHIVE.zip', or unpack it and name the folder with dataset.data_dir or {DATA_DIR_VARIABLE}"
)


def cache_folder() -> Path:
    """Return this user's cache folder for C-MAPSS; it need not exist."""
    return cache_root() / "cmapss"


def find_nasa_files(config: CmapssConfig) -> Path | None:
    """Return the folder that holds the subset's files, or None for a simulated fleet.

    Raises:
        DataError: the user named a folder, or asked for the NASA files, and they are not there.
    """
    if config.source == "simulated":
        return None
    if config.data_dir is not None:
        return _folder_with(
            config.data_dir.expanduser(), config.subset, f"dataset.data_dir = {config.data_dir}"
        )
    if named := os.environ.get(DATA_DIR_VARIABLE):
        return _folder_with(Path(named).expanduser(), config.subset, f"{DATA_DIR_VARIABLE} = {named}")
    folder = cache_folder()
    folders = (folder, folder / "CMAPSSData")
    anything = any((place / name).exists() for place in folders for name in file_names(config.subset))
    if config.source == "nasa" or anything:
        return _folder_with(folder, config.subset, f"the cache folder {folder}")
    return None


def _folder_with(folder: Path, subset: Subset, named_by: str) -> Path:
    """Return the folder, or the one inside it that NASA's archive unpacks to."""
    for candidate in (folder, folder / "CMAPSSData"):
        missing = [name for name in file_names(subset) if not (candidate / name).is_file()]
        if not missing:
            return candidate
        if len(missing) < len(file_names(subset)):
            break
    else:
        missing = list(file_names(subset))
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder ({named_by}); {HOW_TO_GET}")
    raise DataError(
        f"{folder}: {', '.join(missing)} not found ({named_by}); {HOW_TO_GET}, "
        "or set dataset.source = 'simulated'"
    )
