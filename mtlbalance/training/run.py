"""One run from its config to its results: ``run_training``."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mtlbalance.allocator import keep_freed_memory
from mtlbalance.errors import DataError, MtlBalanceError, RunFolderError, exit_code_of
from mtlbalance.slots import MultiTaskData
from mtlbalance.training import atomic
from mtlbalance.training.batches import training_batches
from mtlbalance.training.building import build_state
from mtlbalance.training.checkpoints import Checkpoints
from mtlbalance.training.data import build_data
from mtlbalance.training.devices import resolve_device
from mtlbalance.training.environment import changed_environment, describe_environment
from mtlbalance.training.fingerprint import fingerprint
from mtlbalance.training.observers import Observers
from mtlbalance.training.progress import ProgressReport, RunShape, make_progress
from mtlbalance.training.record import EventLog, write_json
from mtlbalance.training.results import evaluation_batches, write_results
from mtlbalance.training.run_folder import RunFolder, open_run_folder
from mtlbalance.training.samples import sample_seed
from mtlbalance.training.seeding import reproducible, seed_everything
from mtlbalance.training.state import RunState
from mtlbalance.training.stopping import StopRequest, stops_on_signals
from mtlbalance.training.team import Team, join_team
from mtlbalance.training.trainer import StopReason, Trainer

if TYPE_CHECKING:
    from mtlbalance.config import RunConfig


@dataclass(frozen=True)
class RunOutcome:
    """What ``run_training`` did.

    Args:
        run_dir: the run's folder.
        results: the content of its ``results.json``.
        status: ``"finished"``, or ``"already-finished"`` when there was nothing left to do.
        is_first: whether this process is the only one, or the first rank; it speaks for all.
    """

    run_dir: Path
    results: dict[str, Any]
    status: Literal["finished", "already-finished"]
    is_first: bool = True


def run_training(
    config: RunConfig, *, out: Path | None = None, fresh: bool = False, quiet: bool = False
) -> RunOutcome:
    """Train what ``config`` says, or resume it, or say that it is finished.

    Started by ``torchrun``, every rank calls this: each batch is shared among them, rank 0 alone has the folder, and
    the result is that of one process, but for BatchNorm, dropout and rounding.

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
        OtherRankError: another rank failed.
    """
    run_dir = out if out is not None else default_run_dir(config)
    place = run_dir.absolute()  # a plugin may go to another folder
    if config.run.keep_freed_memory:
        keep_freed_memory()
    with ExitStack() as stack:
        stop = stack.enter_context(stops_on_signals(config.run.preempt_signal))
        team = stack.enter_context(join_team())
        folder = team.first(lambda: stack.enter_context(open_run_folder(place)))
        results = team.shared(lambda: _look_into(folder, config, fresh=fresh))
        stack.enter_context(reproducible(config.run.seed, deterministic=config.run.deterministic))
        if results is not None:
            team.first(lambda: _opened(folder).check_data(fingerprint(build_data(config))))
            return RunOutcome(run_dir, results, "already-finished", team.is_first)
        device = resolve_device(team.device_name(config.run.device))
        progress = make_progress(quiet=quiet or not team.is_first)
        results = _Session(config, place, folder, team, device, stop, progress).run(fresh=fresh)
        return RunOutcome(run_dir, results, "finished", team.is_first)


def default_run_dir(config: RunConfig) -> Path:
    """Return ``{output_dir}/{name}/seed_{seed}``."""
    return config.run.output_dir / config.run.name / f"seed_{config.run.seed}"


def _look_into(folder: RunFolder | None, config: RunConfig, *, fresh: bool) -> dict[str, Any] | None:
    """Return the results of a run that has finished, once it is known that the folder may be used."""
    folder = _opened(folder)
    if fresh:
        folder.check_replaceable()
        return None
    folder.check_config(config.to_toml(), free_keys=config.free_keys())
    return folder.read_results()


def _opened(folder: RunFolder | None) -> RunFolder:
    assert folder is not None, "rank 0 alone has the folder"
    return folder


class _Session:
    """One process at work on a run. Only rank 0 has the folder, and only it reads and writes there."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        folder: RunFolder | None,
        team: Team,
        device: torch.device,
        stop: StopRequest,
        progress: ProgressReport,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.folder = folder
        self.team = team
        self.device = device
        self.stop = stop
        self.progress = progress
        self.log = EventLog(run_dir / "log.jsonl" if team.is_first else None)
        self.checkpoints = Checkpoints(run_dir / "checkpoints")
        self.observers = Observers(config.registry.hook if team.is_first else None, self.log)

    def run(self, *, fresh: bool) -> dict[str, Any]:
        config, team = self.config, self.team
        data, described = self._build_data()
        if not fresh:
            team.first(lambda: _opened(self.folder).check_data(described))
        # Reading data may draw random numbers or not (a warm cache does not); the model must not depend on it.
        seed_everything(config.run.seed)
        state = build_state(config, data, self.device)
        if not team.is_first:  # ranks that drop the same units out would be one rank
            seed_everything(sample_seed(config.run.seed, team.rank))

        # Up to here nothing was written: a run that cannot start leaves what was there before.
        resumed = self._begin(state, described, fresh=fresh)
        self.observers.notify("on_run_start", run_dir=self.run_dir, config=config.to_dict())
        for notice in data.notices:
            self.progress.notice(notice)
        if resumed:
            self._say_where(state)
        stopped = self._fit(state, data)
        results = team.shared(
            lambda: write_results(config, self.run_dir, data, state, self.device, stopped, self.checkpoints)
        )
        self.log.write(
            "finished", stopped=stopped, best_epoch=state.best.epoch, wall_seconds=state.wall_seconds
        )
        self.observers.notify("on_run_end", run_dir=self.run_dir, results=results)
        return results

    def _build_data(self) -> tuple[MultiTaskData, dict[str, Any]]:
        """Build the data on rank 0 and then on the others, so that a cache is written once."""
        built = self.team.first(lambda: build_data(self.config))
        data = build_data(self.config) if built is None else built
        described = fingerprint(data)
        everywhere = self.team.all(described)
        other = [rank for rank, found in enumerate(everywhere) if found != everywhere[0]]
        if other:
            raise DataError(
                f"dataset {self.config.dataset.name!r} gives other data on ranks {', '.join(map(str, other))} than on "
                "rank 0; every rank must read the same files"
            )
        return data, described

    def _begin(self, state: RunState, described: dict[str, Any], *, fresh: bool) -> bool:
        """Load the last sound checkpoint into ``state``, or start the folder's files; return whether resumed."""
        if fresh:
            old = self.team.first(lambda: _opened(self.folder).set_aside())
            if old is not None:
                self.progress.notice(f"the old run was set aside as {old}")
        saved = self.team.shared(self.checkpoints.latest)
        environment = describe_environment(self.device, self.config.plugins) | {"ranks": self.team.size}
        if saved is None:
            self.team.first(lambda: self._start_files(described, environment))
            return False
        state.load_state_dict(saved.weights, saved.state, rank=self.team.rank)
        self.team.first(lambda: self.checkpoints.discard_after(state))
        changed = self.team.first(lambda: self._changed(environment))
        self.log.write(
            "resumed",
            after_epoch=state.epoch,
            after_step=state.step,
            changed=changed,
            environment=environment,
        )
        return True

    def _changed(self, environment: dict[str, Any]) -> list[str]:
        """Return, and warn of, what may give the run other digits here than where it began."""
        config = self.config
        chosen = {
            "dataset": config.dataset.name,
            "backbone": config.backbone.name,
            "balancer": config.balancer.name,
        }
        packages = [config.registry.origin(slot, name).plugin for slot, name in chosen.items()]
        changed = changed_environment(self.run_dir / "environment.json", environment, packages)
        if changed:
            warnings.warn(
                "this run goes on in another environment than it began in, so its result need not be that of a run "
                f"that never stopped, to the last digit ({'; '.join(changed)})",
                RuntimeWarning,
                stacklevel=2,
            )
        return changed

    def _start_files(self, described: dict[str, Any], environment: dict[str, Any]) -> None:
        folder = _opened(self.folder)
        if (folder.path / "metrics.csv").exists():
            lost = f"{folder.path} has finished epochs but no checkpoint, so the run starts again at epoch 0"
            self.log.write("checkpoints_lost", reason=lost)
            warnings.warn(lost, RuntimeWarning, stacklevel=2)
        atomic.write_text(folder.config_path, self.config.to_toml())
        write_json(folder.data_path, described)
        write_json(folder.path / "environment.json", environment)
        config_hash = self.config.result_hash(described["data_source"], described["protocol"])
        self.log.write("started", config_hash=config_hash, device=environment["device"])

    def _say_where(self, state: RunState) -> None:
        batches = 0 if state.unfinished is None else state.unfinished.batches
        inside = f"; of the next one, {batches} batches are done" if batches else ""
        last = f"epoch {state.epoch} was the last" if state.epoch >= 0 else "no epoch has come"
        self.progress.notice(f"resuming: {last} to an end (of {self.config.training.epochs}, from 0){inside}")

    def _fit(self, state: RunState, data: MultiTaskData) -> StopReason:
        config, device = self.config, self.device
        batches = training_batches(
            data.train, state.order, device, num_workers=config.training.num_workers, team=self.team
        )
        watched = evaluation_batches(
            config, data.test if data.validation is None else data.validation, device
        )
        trainer = Trainer(
            state, data, config.dataset.name, batches, watched, config.training, device,
            team=self.team, checkpoints=self.checkpoints, run_dir=self.run_dir, stop=self.stop,
            progress=self.progress, observers=self.observers, log=self.log,
        )  # fmt: skip
        names = [task.name for task in data.tasks]
        self.progress.start(
            RunShape(
                config.run.name, names, data.key_metric, config.training.epochs, len(batches), state.epoch + 1
            )
        )
        try:
            return trainer.fit()
        except (KeyboardInterrupt, SystemExit) as interruption:
            with suppress(RunFolderError):
                self.log.write("interrupted", by=type(interruption).__name__, last_finished_epoch=state.epoch)
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, MtlBalanceError) else f"{type(error).__name__}: {error}"
            with suppress(RunFolderError):  # what failed may be the disk
                self.log.write(
                    "failed", reason=reason, exit_code=exit_code_of(error), last_finished_epoch=state.epoch
                )
            raise
        finally:
            self.progress.stop()
