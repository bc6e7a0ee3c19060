"""One run from its config to its results: ``run_training``."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from mtlbalance.balancers.base import Balancer
from mtlbalance.errors import MtlBalanceError, RunFolderError
from mtlbalance.plugins.references import build_plugin
from mtlbalance.slots import MultiTaskData
from mtlbalance.training import atomic
from mtlbalance.training.batches import ShuffleOrder, count_samples, training_batches
from mtlbalance.training.checkpoints import Checkpoints
from mtlbalance.training.data import build_data
from mtlbalance.training.devices import resolve_device
from mtlbalance.training.early_stopping import BestEpoch, EarlyStopping
from mtlbalance.training.environment import describe_environment
from mtlbalance.training.evaluation import weight_ema
from mtlbalance.training.fingerprint import fingerprint
from mtlbalance.training.gradient_stats import GradientStats
from mtlbalance.training.model import build_model
from mtlbalance.training.observers import Observers
from mtlbalance.training.optimizers import make_optimizer
from mtlbalance.training.precision import make_scaler
from mtlbalance.training.progress import ProgressReport, RunShape, make_progress
from mtlbalance.training.record import EventLog, write_json
from mtlbalance.training.results import evaluation_batches, write_results
from mtlbalance.training.run_folder import RunFolder, open_run_folder
from mtlbalance.training.schedules import plateau_schedule
from mtlbalance.training.seeding import reproducible, seed_everything
from mtlbalance.training.state import RunState
from mtlbalance.training.stopping import StopRequest, stops_on_signals
from mtlbalance.training.trainer import Trainer

if TYPE_CHECKING:
    from mtlbalance.config import RunConfig


@dataclass(frozen=True)
class RunOutcome:
    """What ``run_training`` did.

    Args:
        run_dir: the run's folder.
        results: the content of its ``results.json``.
        status: ``"finished"``, or ``"already-finished"`` when there was nothing left to do.
    """

    run_dir: Path
    results: dict[str, Any]
    status: Literal["finished", "already-finished"]


def run_training(
    config: RunConfig, *, out: Path | None = None, fresh: bool = False, quiet: bool = False
) -> RunOutcome:
    """Train what ``config`` says, or resume it, or say that it is finished.

    Args:
        config: a checked config.
        out: the run's folder; default ``{output_dir}/{name}/seed_{seed}``.
        fresh: set an existing run aside (``<folder>.old-1``, never deleted) and start again.
        quiet: show no progress.

    Raises:
        RunFolderError: the folder is in use, cannot be written, or holds a run of another config or other data.
        DeviceError: ``run.device`` does not exist here.
        DataError, PluginError: the data or a plugin cannot be used.
        TrainingError: training failed, for example on a NaN loss; earlier checkpoints are intact.
    """
    run_dir = out if out is not None else default_run_dir(config)
    with stops_on_signals(config.run.preempt_signal) as stop, open_run_folder(run_dir) as folder:
        results = None
        if fresh:
            folder.check_replaceable()
        else:
            folder.check_config(config.to_toml(), free_keys=config.free_keys())
            results = folder.read_results()
        with reproducible(config.run.seed, deterministic=config.run.deterministic):
            if results is not None:
                folder.check_data(fingerprint(build_data(config)))
                return RunOutcome(run_dir, results, "already-finished")
            device = resolve_device(config.run.device)
            return _train(config, folder, device, stop, fresh=fresh, progress=make_progress(quiet=quiet))


def default_run_dir(config: RunConfig) -> Path:
    """Return ``{output_dir}/{name}/seed_{seed}``."""
    return config.run.output_dir / config.run.name / f"seed_{config.run.seed}"


def _train(
    config: RunConfig,
    folder: RunFolder,
    device: torch.device,
    stop: StopRequest,
    *,
    fresh: bool,
    progress: ProgressReport,
) -> RunOutcome:
    data = build_data(config)
    described = fingerprint(data)
    if not fresh:
        folder.check_data(described)
    # Reading data may draw random numbers or not (a warm cache does not); the model must not depend on it.
    seed_everything(config.run.seed)
    state = _build_state(config, data, device)
    run_dir = folder.path

    # Up to here nothing was written: a run that cannot start leaves what was there before.
    if fresh and (old := folder.set_aside()) is not None:
        progress.notice(f"the old run was set aside as {old}")
    log = EventLog(run_dir / "log.jsonl")
    checkpoints = Checkpoints(run_dir / "checkpoints")
    resumed = _resume(folder, config, described, state, device, log, checkpoints)
    observers = Observers(config.registry.hook, log)
    observers.notify("on_run_start", run_dir=run_dir, config=config.to_dict())
    for notice in data.notices:
        progress.notice(notice)
    if resumed:
        inside = (
            ""
            if state.unfinished is None
            else f", {state.unfinished.batches} batches of the next one are done"
        )
        progress.notice(
            f"resuming: epoch {state.epoch} was the last to finish (of {config.training.epochs}, from 0){inside}"
        )

    batches = training_batches(data.train, state.order, device, num_workers=config.training.num_workers)
    watched = evaluation_batches(config, data.test if data.validation is None else data.validation, device)
    trainer = Trainer(
        state, data, config.dataset.name, batches, watched, config.training, device,
        checkpoints=checkpoints, run_dir=run_dir, stop=stop, progress=progress, observers=observers, log=log,
    )  # fmt: skip
    names = [task.name for task in data.tasks]
    progress.start(
        RunShape(
            config.run.name, names, data.key_metric, config.training.epochs, len(batches), state.epoch + 1
        )
    )
    try:
        stopped = trainer.fit()
    except (KeyboardInterrupt, SystemExit) as interruption:
        with suppress(RunFolderError):
            log.write("interrupted", by=type(interruption).__name__, last_finished_epoch=state.epoch)
        raise
    except MtlBalanceError as error:
        with suppress(RunFolderError):  # what failed may be the disk
            log.write("failed", reason=str(error), last_finished_epoch=state.epoch)
        raise
    finally:
        progress.stop()
    results = write_results(config, folder.path, data, state, device, stopped, checkpoints)
    log.write("finished", stopped=stopped, best_epoch=state.best.epoch, wall_seconds=state.wall_seconds)
    observers.notify("on_run_end", run_dir=run_dir, results=results)
    return RunOutcome(run_dir, results, "finished")


def _build_state(config: RunConfig, data: MultiTaskData, device: torch.device) -> RunState:
    training = config.training
    backbone: nn.Module = build_plugin(
        config.backbone.registration, config.backbone.options, data.inputs, data.tasks
    )
    # Built on the CPU and then moved, so that every device starts from the same weights.
    model = build_model(backbone, data.tasks, name=config.backbone.registration.name).to(device)
    balancer: Balancer = build_plugin(config.balancer.registration, config.balancer.options, data.tasks)
    balancer = balancer.to(device)
    optimizer = make_optimizer(model, balancer, training)
    mode = data.key_metric_mode
    order = ShuffleOrder(
        count_samples(data.train, "training"),
        training.batch_size,
        drop_last=training.drop_last,
        seed=config.run.seed,
    )
    return RunState(
        model=model,
        ema=weight_ema(model, training.ema_decay),
        balancer=balancer,
        optimizer=optimizer,
        plateau=plateau_schedule(optimizer, mode, training),
        order=order,
        best=BestEpoch(mode),
        early_stopping=EarlyStopping(BestEpoch(mode, training.min_delta), training.patience),
        scaler=make_scaler(training.precision, device),
        stats=GradientStats(balancer, list(model.trunk.parameters()), every=training.gradient_stats_every),
    )


def _resume(
    folder: RunFolder,
    config: RunConfig,
    described: dict[str, Any],
    state: RunState,
    device: torch.device,
    log: EventLog,
    checkpoints: Checkpoints,
) -> bool:
    """Load the last sound checkpoint into ``state``, or start the folder's files; return whether resumed."""
    saved = checkpoints.latest()
    environment = describe_environment(device)
    if saved is None:
        if (folder.path / "metrics.csv").exists():
            lost = f"{folder.path} has finished epochs but no checkpoint, so the run starts again at epoch 0"
            log.write("checkpoints_lost", reason=lost)
            warnings.warn(lost, RuntimeWarning, stacklevel=2)
        atomic.write_text(folder.config_path, config.to_toml())
        write_json(folder.data_path, described)
        write_json(folder.path / "environment.json", environment)
        config_hash = config.result_hash(described["data_source"], described["protocol"])
        log.write("started", config_hash=config_hash, device=environment["device"])
        return False
    state.load_state_dict(saved.weights, saved.state)
    checkpoints.discard_after(state)
    log.write("resumed", after_epoch=state.epoch, after_step=state.step, environment=environment)
    return True
