"""``mtlbalance predict`` and ``mtlbalance export``: using what a run has trained."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtlbalance.cli.configs import JsonOption
from mtlbalance.cli.output import print_json, print_stderr, stdout_for_results

if TYPE_CHECKING:
    from mtlbalance.inference import LoadedRun


class Split(StrEnum):
    """A set of a run's data."""

    TRAINING = "training"
    VALIDATION = "validation"
    TEST = "test"


class WeightsChoice(StrEnum):
    """Which of a run's weights to use."""

    EMA = "ema"
    LAST = "last"
    LIVE = "live"


class FormatChoice(StrEnum):
    """A format to export to."""

    SAFETENSORS = "safetensors"
    PT2 = "pt2"
    ONNX = "onnx"


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides of what does not decide the result, such as dataset.data_dir=/data.",
        show_default=False,
    ),
]
WeightsOption = Annotated[
    WeightsChoice,
    typer.Option(
        help="ema: averaged, of the best epoch; last: averaged, of the last epoch; live: after the last step, not "
        "averaged."
    ),
]


def predict(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The CSV file to write.", show_default=False)],
    overrides: OverridesArgument = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="A file to predict on: inputs as .npy, .npz, .pt or .csv, or a file that the dataset reads itself.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="A set of the run's data to predict on.", show_default=False)
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Let the dataset read the file, whatever its name.")
    ] = False,
    weights: WeightsOption = WeightsChoice.EMA,
    logits: Annotated[
        bool, typer.Option("--logits", help="Write a classification's logits, not its probabilities.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in memory at a time.")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Predict with a finished run, on a file or on a set of its own data; write a CSV row a sample."""
    if (input_file is None) == (split is None):
        raise typer.BadParameter("give either --input FILE or --split training|validation|test")
    from mtlbalance.inference import load_run
    from mtlbalance.inference.chunks import dataset_chunks
    from mtlbalance.inference.input_files import read_chunks
    from mtlbalance.inference.run_files import check_output
    from mtlbalance.inference.table import write_predictions
    from mtlbalance.training.devices import resolve_device
    from mtlbalance.training.stopping import stops_on_signals

    check_output(run, out, reads=input_file)
    with stdout_for_results(), stops_on_signals():  # so that half a file is not left behind
        chosen = resolve_device(device, option="--device")
        loaded = load_run(run, weights=weights.value, overrides=overrides or [])
        show_notices(loaded)
        if input_file is not None:
            chunks = read_chunks(input_file, loaded, batch_size, raw=raw)
        else:
            assert split is not None
            chunks = dataset_chunks(
                loaded.split(split.value), batch_size,
                name=loaded.config.dataset.name, num_workers=loaded.config.training.num_workers,
            )  # fmt: skip
        predicted = loaded.predict_chunks(chunks, device=str(chosen), logits=True)
        table = write_predictions(out, predicted, loaded.tasks, logits=logits)
    for task, count in table.non_finite.items():
        print_stderr(f"warning: {count} of {table.samples} predictions of task {task!r} are NaN or infinite")
    if as_json:
        print_json(
            {
                "run": loaded.results["run"],
                "run_dir": str(run),
                "weights": weights.value,
                "epoch": loaded.epoch,
                "device": str(chosen),
                "source": str(input_file) if input_file is not None else split,
                "samples": table.samples,
                "columns": table.columns,
                "non_finite": table.non_finite,
                "notices": loaded.results.get("notices", []),
                "written_to": str(out),
            }
        )
    else:
        print(f"{table.samples} predictions of {loaded.results['run']}, {describe_weights(loaded)}")
        print(f"columns      {', '.join(table.columns)}")
        print(f"written to   {out}")


def export(
    run: RunArgument,
    file_format: Annotated[
        FormatChoice,
        typer.Option(
            "--format",
            help="safetensors: weights; pt2: for torch.export.load; onnx: needs mtlbalance[onnx].",
            show_default=False,
        ),
    ],
    overrides: OverridesArgument = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default="RUN/exports/<weights>.<format>")
    ] = None,
    weights: WeightsOption = WeightsChoice.EMA,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Allowed difference, relative to a task's largest output (or 0.1).")
    ] = 1e-5,
    as_json: JsonOption = False,
) -> None:
    """Export a finished run's model as one file that takes any batch size, checked against the model on real inputs."""
    from mtlbalance.inference import load_run
    from mtlbalance.inference.exporting import export_run
    from mtlbalance.inference.formats import check_installed
    from mtlbalance.training.stopping import stops_on_signals

    check_installed(file_format.value)
    path = out if out is not None else run / "exports" / f"{weights.value}.{file_format.value}"
    with stdout_for_results(), stops_on_signals():
        loaded = load_run(run, weights=weights.value, overrides=overrides or [])
        show_notices(loaded)
        exported = export_run(loaded, file_format.value, path, tolerance=tolerance)
    if as_json:
        print_json(
            {
                "run": loaded.results["run"],
                "run_dir": str(run),
                "format": file_format,
                "weights": weights,
                "epoch": loaded.epoch,
                "parity": [task.to_dict() for task in exported.parity],
                "tolerance": tolerance,
                "compared_on": exported.compared_on,
                "batch_sizes": exported.batch_sizes,
                "bytes": exported.num_bytes,
                "notices": loaded.results.get("notices", []),
                "written_to": str(path),
            }
        )
        return
    print(f"{loaded.results['run']}, {describe_weights(loaded)}, as {file_format.value}")
    sizes = " and ".join(map(str, exported.batch_sizes))
    print(f"compared with the model on the {exported.compared_on} set, in batches of {sizes}:")
    for task in exported.parity:
        print(f"  {task.task:<12} largest difference {task.max_difference:.3g}, allowed {task.allowed:.3g}")
    print(f"written to   {path} ({exported.num_bytes:,} bytes)")


def show_notices(run: LoadedRun) -> None:
    """Print what a user must know of the data that a run was trained on."""
    for notice in run.results.get("notices", []):
        print_stderr(f"notice: {notice}")


def describe_weights(run: LoadedRun) -> str:
    """Return which weights a run was loaded with, in words."""
    words = {
        "ema": "averaged weights of epoch",
        "last": "averaged weights of epoch",
        "live": "live weights of epoch",
    }
    return f"{words[run.weights]} {run.epoch}"
