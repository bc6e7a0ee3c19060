"""``mtlbalance-cmapss``: fetch and check data files, write a simulated fleet, compare a run with published figures."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from mtlbalance.errors import DataError, MtlBalanceError

from .config import SUBSETS, CmapssConfig, Subset

app = typer.Typer(
    help="The C-MAPSS example of mtlbalance.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.command("fetch")
def fetch_files(
    source: Annotated[str, typer.Option("--from", help="NASA's archive: a ZIP file, or its address")],
    to: Annotated[
        Path | None, typer.Option(help="a new folder", show_default="CMAPSSData in the cache folder")
    ] = None,
) -> None:
    """Unpack NASA's archive where runs find it, once every file has the right checksum."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from .fetch import fetch
    from .locate import cache_folder

    target = cache_folder() / "CMAPSSData" if to is None else to.expanduser()
    columns = (TextColumn("download"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("download", total=None, visible=False)
        fetch(
            source,
            target,
            advance=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
        )
    typer.echo(f"{target}: all files are there and are NASA's own")
    if to is not None:
        typer.echo(f"runs find them with MTLBALANCE_CMAPSS_DIR={target}, or dataset.data_dir")


@app.command()
def verify(
    folder: Annotated[
        Path | None,
        typer.Argument(help="where the files are; else MTLBALANCE_CMAPSS_DIR, else the cache folder"),
    ] = None,
) -> None:
    """Read every subset that a folder holds and compare its files with NASA's checksums."""
    from .checksums import differing_files
    from .files import read_subset
    from .locate import find_nasa_files
    from .simulate import is_simulated

    found: Path | None = None
    altered = False
    for subset in SUBSETS:
        try:
            found = find_nasa_files(CmapssConfig(subset=subset, source="nasa", data_dir=folder))
        except DataError as error:
            typer.echo(f"{subset}: absent ({str(error).partition(';')[0]})", err=True)
            continue
        assert found is not None  # source = "nasa" gives a folder or raises
        data = read_subset(found, subset)
        differing = differing_files(found, subset)
        altered |= bool(differing)
        verdict = f"differ from NASA's: {', '.join(differing)}" if differing else "NASA's own"
        if is_simulated(found):
            verdict = "a simulated fleet"
        typer.echo(
            f"{subset}: {len(data.train.starts)} training engines ({len(data.train)} rows), "
            f"{len(data.test.starts)} test engines ({len(data.test)} rows), {verdict}"
        )
    if found is None:
        raise DataError("no complete subset was found")
    if altered:
        raise DataError("some files are not NASA's; results from them are not comparable with published ones")


@app.command()
def simulate(
    subset: Annotated[Subset, typer.Argument(help="FD002 and FD004 fly at six operating conditions")],
    folder: Annotated[Path, typer.Argument(help="a new folder to write the three files to")],
    engines: Annotated[int, typer.Option(min=4, help="engines in each file")] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a simulated fleet in NASA's format. It is marked as simulated, and is treated so."""
    from .simulate import Fleet, write_fleet

    if folder.exists():
        raise DataError(f"{folder}: exists already; name a new folder")
    try:
        write_fleet(Fleet(subset, engines, seed), folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error
    typer.echo(f"{folder}: {engines} training and {engines} test engines, simulated")


@app.command()
def compare(run: Annotated[Path, typer.Argument(help="a run's folder, or its results.json")]) -> None:
    """Put a finished run beside the study's figures, or say why that would mislead."""
    from .published import ComparisonError, compare_with_published

    path = run / "results.json" if run.is_dir() else run
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a run's results: {error}") from error
    config_path = path.with_name("config.resolved.toml")
    config: dict[str, Any] | None = None
    if config_path.exists():
        try:
            config = tomllib.loads(config_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{config_path}: cannot be read as a run's config: {error}") from error
    try:
        comparison = compare_with_published(results, config)
    except ComparisonError as error:
        raise ComparisonError(f"{path}: {error}") from error
    typer.echo(f"{comparison.subset}, {comparison.method}")
    for metric, measured in comparison.measured.items():
        line = f"  {metric}: {measured:.2f}"
        for label, figures in (("study", comparison.published), ("literature", comparison.literature)):
            if figure := figures.get(metric):
                spread = "" if figure.std is None else f" ± {figure.std:g}"
                line += f", {label} {figure.mean:g}{spread}"
        typer.echo(line)
    typer.echo("What is not alike:")
    for difference in comparison.differences:
        typer.echo(f"- {difference}")


def run_cli() -> None:
    """Run the command line; a user's mistake is a message and an exit code, not a traceback."""
    try:
        app()
    except MtlBalanceError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run_cli()
