"""The training loop: the study's cadence of 14 stages, for any dataset, backbone and balancer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mtlbalance.config.sections import TrainingSection
from mtlbalance.errors import DataError, NonFiniteError, OtherRankError, TrainingError, exit_code_of
from mtlbalance.slots import MultiTaskData
from mtlbalance.training.batches import Batch, EvaluationBatch, EvaluationBatches, TrainingBatches
from mtlbalance.training.checkpoints import Checkpoints
from mtlbalance.training.evaluation import predict, score
from mtlbalance.training.memory import names_out_of_memory
from mtlbalance.training.observers import Observers
from mtlbalance.training.parallel import average_over_ranks
from mtlbalance.training.precision import matmul_precision
from mtlbalance.training.progress import ProgressReport
from mtlbalance.training.record import CsvTable, EventLog, Row
from mtlbalance.training.samples import first_input, reading
from mtlbalance.training.schedules import adapt_weight_decay, warm_up_learning_rate
from mtlbalance.training.seeding import rng_state, set_rng_state
from mtlbalance.training.state import RunState, UnfinishedEpoch
from mtlbalance.training.step import TrainingStep
from mtlbalance.training.stopping import StopRequest, stop_exception
from mtlbalance.training.team import Team

StopReason = Literal["epochs", "early-stop", "non-finite"]


class Trainer:
    """Trains one run from where its state is to its end, an epoch at a time.

    Args:
        state: the run; moved forward in place.
        data: for the evaluation of the watched set.
        dataset: the dataset's name, for messages.
        batches: the training set.
        watched: the set that decides best epoch, plateau and early stop.
        training: the options.
        device: where the model is.
        team: the ranks that train together; only the first one touches what follows.
        checkpoints: where the run is saved.
        run_dir: the run's folder.
        stop: whether the run was asked to stop.
        progress: what a person sees.
        observers: plugins that watch.
        log: the run's events.
    """

    def __init__(
        self,
        state: RunState,
        data: MultiTaskData,
        dataset: str,
        batches: TrainingBatches,
        watched: EvaluationBatches,
        training: TrainingSection,
        device: torch.device,
        *,
        team: Team,
        checkpoints: Checkpoints,
        run_dir: Path,
        stop: StopRequest,
        progress: ProgressReport,
        observers: Observers,
        log: EventLog,
    ) -> None:
        self.state = state
        self.data = data
        self.dataset = dataset
        self.batches = batches
        self.watched = watched
        self.training = training
        self.team = team
        self.checkpoints = checkpoints
        self.run_dir = run_dir
        self.stop = stop
        self.progress = progress
        self.observers = observers
        self.log = log
        forward: nn.Module = state.model
        if team.size > 1:
            forward = average_over_ranks(state.model, first_input(data.train).unsqueeze(0))
        self._step = TrainingStep(state, data.tasks, training, device, forward, team)
        self._unevaluated: Exception | None = None
        self._saved_at = self._session_began = time.monotonic()

    def fit(self) -> StopReason:
        """Train until the last epoch or the early stop; every epoch ends on disk, and a long one is saved inside.

        A first Ctrl-C or SIGTERM, here, finishes the step and saves the run before it is raised.

        Raises:
            NonFiniteError: a loss, a gradient or a weight is not finite, and ``on_nonfinite`` says ``"raise"``, or no
                epoch had ended yet.
            DataError: the dataset cannot be read.
            KeyboardInterrupt, SystemExit: the run was asked to stop; it is saved.
        """
        with self.stop.deferred():
            try:
                return self._fit()
            except NonFiniteError as error:
                if self.training.on_nonfinite != "stop":
                    raise
                return self._end_before(error)

    def _fit(self) -> StopReason:
        state, training = self.state, self.training
        self.team.first(self._open_tables)
        if state.unfinished is None and state.early_stopping.exhausted(state.epoch):
            return "early-stop"  # killed between the last checkpoint and the results
        for epoch in range(state.epoch + 1, training.epochs):
            self._epoch(epoch)
            self._leave_if_asked()
            if state.early_stopping.exhausted(epoch):  # 14 early stop, last
                return "early-stop"
        return "epochs"

    def _open_tables(self) -> None:
        self._metrics_csv = CsvTable(self.run_dir / "metrics.csv", self.state.metrics)
        self._stats_csv = CsvTable(self.run_dir / "gradient_stats.csv", self.state.gradient_stats)

    def _epoch(self, epoch: int) -> None:
        state, training = self.state, self.training
        self._session_began = time.monotonic()
        unfinished = state.begin_epoch()
        if unfinished.row is None:
            warm_up_learning_rate(state.optimizer, epoch, training)  # 1 warm-up of the learning rate
            adapt_weight_decay(state.optimizer, epoch, training)  # 2 adaptive weight decay
            with matmul_precision(training.matmul_precision):
                self._train(epoch, unfinished)  # 3-10 a batch at a time
        assert unfinished.row is not None

        metrics = self._evaluate(unfinished)  # 11 evaluation with the EMA weights
        key_value = metrics[self.data.key_metric]
        if epoch >= training.warmup_epochs:
            state.plateau.step(key_value)  # 12 plateau schedule, only after warm-up
        is_best = state.best.update(epoch, key_value)  # 13 best tracking and checkpoint
        state.early_stopping.update(epoch, key_value)
        seconds = self._seconds(unfinished)
        row = unfinished.row | metrics | {"seconds": seconds}
        state.epoch, state.unfinished = epoch, None
        state.wall_seconds += seconds
        state.metrics.append(row)
        state.gradient_stats.append(unfinished.stats_row)
        generators = self.team.all(rng_state())
        self.team.first(lambda: self._keep(row, unfinished.stats_row, generators, is_best))
        self._saved_at = time.monotonic()
        self.progress.epoch(row, state.balancer.get_weights(), self._best_in_words())
        self.observers.notify("on_epoch_end", run_dir=self.run_dir, epoch=epoch, metrics=dict(row))

    def _keep(self, row: Row, stats_row: Row, generators: list[dict[str, Any]], is_best: bool) -> None:
        self.checkpoints.save(self.state, generators, is_best=is_best)
        self._metrics_csv.append(row)  # after it: what a kill keeps from the tables, a resume puts there
        self._stats_csv.append(stats_row)

    def _train(self, epoch: int, unfinished: UnfinishedEpoch) -> None:
        """Stages 3 to 10, from the first batch that is not done yet."""
        state, last = self.state, len(self.batches) - 1
        state.model.train()
        state.balancer.train()
        group = state.optimizer.param_groups[0]
        row: Row = {
            "epoch": epoch,
            "step": 0,
            "lr": float(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
        }
        first = unfinished.batches
        batches = self._training_batches(first)
        while (batch := self._next(batches, unfinished, first)) is not None:  # 3 fetch
            index = unfinished.batches
            skipped = self._step(batch, unfinished.losses, epoch, measure=index == last)  # 4-10
            if skipped:
                self.log.write("step_skipped", epoch=epoch, batch=index, reason=skipped)
                self.progress.notice(f"left out: {skipped}")
            if index == last:
                unfinished.stats_row = state.stats.row(epoch, state.step)
            unfinished.batches += 1
            self.progress.step(epoch, index, unfinished.losses.means)
        state.balancer.end_epoch()
        unfinished.losses.check(epoch)
        self._step.check_weights(epoch)
        self._step.check_ranks()
        unfinished.row = {**row, "step": state.step, **unfinished.losses.means()}

    def _training_batches(self, first: int) -> Iterator[Batch]:
        with names_out_of_memory("reading a training batch", "training.batch_size or training.num_workers"):
            yield from reading(self.batches.epoch(first), self.dataset, "training")

    def _next(self, batches: Iterator[Batch], unfinished: UnfinishedEpoch, first: int) -> Batch | None:
        """Read the next batch, None at the end; here, between two steps, ranks agree on whether they go on.

        What was trained since batch ``first`` is saved where they do not, because of a signal or of a batch that one
        of them cannot read, and where a checkpoint is due.
        """
        batch, failure = None, None
        if not self.stop.signum:
            try:
                batch = next(batches, None)
            except Exception as error:
                failure = error
        overdue = time.monotonic() - self._saved_at >= 60 * self.training.checkpoint_minutes
        signum, failed, due = self.team.largest(self.stop.signum, exit_code_of(failure), int(overdue))
        if (signum or failed or due) and unfinished.batches > first:
            self._save(unfinished)
        if signum:  # first: a process that loads samples may have died of the same signal
            raise stop_exception(signum)
        if failure is not None:
            raise failure
        if failed:
            raise OtherRankError("another rank cannot read its batch; see its message", failed)
        return batch

    def _evaluate(self, unfinished: UnfinishedEpoch) -> dict[str, float]:
        """Evaluate on rank 0; asked to stop meanwhile, or unable to, save the run as it was before, and stop."""
        generators = rng_state()
        found = self.team.shared(self._evaluate_here)
        if isinstance(found, dict):
            return found
        set_rng_state(generators)
        self._save(unfinished)
        self._leave_if_asked()
        raise self._unevaluated or OtherRankError("rank 0 could not evaluate; see its message", found)

    def _evaluate_here(self) -> dict[str, float] | int:
        """Return the metrics, or the exit code of what is in the way."""
        try:
            with names_out_of_memory("the evaluation", "training.eval_batch_size"):
                self.state.ema.copy_the_rest(self.state.model)
                (predictions,) = predict([self.state.ema], self._watched_batches())
                return score(self.data, predictions)
        except (_StopRequestedError, DataError, TrainingError) as error:
            self._unevaluated = error
            return exit_code_of(error)

    def _watched_batches(self) -> Iterator[EvaluationBatch]:
        which = "test" if self.data.validation is None else "validation"
        for batch in reading(iter(self.watched), self.dataset, which):
            if self.stop.signum:
                raise _StopRequestedError
            yield batch

    def _save(self, unfinished: UnfinishedEpoch) -> None:
        """Save the run inside an epoch, unless something in it is not finite."""
        epoch = self.state.epoch + 1
        unfinished.losses.check(epoch)
        self._step.check_weights(epoch)
        seconds = unfinished.seconds
        unfinished.seconds = self._seconds(unfinished)
        generators = self.team.all(rng_state())
        self.team.first(lambda: self.checkpoints.save(self.state, generators))
        unfinished.seconds = seconds
        self._saved_at = time.monotonic()

    def _leave_if_asked(self) -> None:
        (signum,) = self.team.largest(self.stop.signum)
        if signum:
            raise stop_exception(signum)

    def _end_before(self, error: NonFiniteError) -> StopReason:
        """Go back to the end of the last epoch, and end the run there."""
        saved = self.team.shared(lambda: self.checkpoints.end_of_epoch(self.state.epoch))
        if saved is None:
            raise error
        self.state.load_state_dict(saved.weights, saved.state, rank=self.team.rank)
        self.log.write("stopped_non_finite", reason=str(error), last_finished_epoch=self.state.epoch)
        self.progress.notice(f"training ends after epoch {self.state.epoch}: {error}")
        return "non-finite"

    def _seconds(self, unfinished: UnfinishedEpoch) -> float:
        return unfinished.seconds + time.monotonic() - self._session_began

    def _best_in_words(self) -> str:
        best = self.state.best
        return "no best epoch yet" if best.value is None else f"best {best.value:.4g} at epoch {best.epoch}"


class _StopRequestedError(Exception):
    """Leaves an evaluation that is to be done again when the run goes on."""
