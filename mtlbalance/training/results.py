"""What a run comes to: the best weights, the test set where it was kept apart, and ``results.json``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from mtlbalance.errors import TrainingError
from mtlbalance.slots import MultiTaskData
from mtlbalance.training import atomic
from mtlbalance.training.batches import EvaluationBatches, count_samples
from mtlbalance.training.checkpoints import Checkpoints
from mtlbalance.training.data import describe_inputs
from mtlbalance.training.evaluation import WeightEMA, predict, score
from mtlbalance.training.memory import names_out_of_memory
from mtlbalance.training.model import parameter_counts
from mtlbalance.training.record import is_training_column, json_bytes, strict_json
from mtlbalance.training.samples import reading
from mtlbalance.training.state import RunState
from mtlbalance.training.sums import RESULTS, write_sums

if TYPE_CHECKING:
    from mtlbalance.config import RunConfig

RESULTS_SCHEMA = 1


def evaluation_batches(config: RunConfig, dataset: Any, device: torch.device) -> EvaluationBatches:
    """Return a set to evaluate on, in the batch size that the config says."""
    size = config.training.eval_batch_size or 4 * config.training.batch_size
    return EvaluationBatches(dataset, size, device, num_workers=config.training.num_workers)


def write_results(
    config: RunConfig,
    run_dir: Path,
    data: MultiTaskData,
    state: RunState,
    device: torch.device,
    stopped: str,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Keep the best weights, read the test set if that is still due, and write ``results.json`` last."""
    started = time.perf_counter()
    if state.best.epoch is None:
        raise TrainingError(
            f"the key metric {data.key_metric!r} was NaN in every epoch, so no epoch is the best; see metrics.csv"
        )
    best_weights = checkpoints.best_weights(state.best.epoch)
    atomic.write_bytes(run_dir / "model.safetensors", best_weights)
    watched_best, watched_final = (
        {name: value for name, value in state.metrics[epoch].items() if not is_training_column(name)}
        for epoch in (state.best.epoch, state.epoch)
    )
    results: dict[str, Any] = {
        "schema": RESULTS_SCHEMA,
        "run": config.run.name,
        "dataset": config.dataset.registration.name,
        "backbone": config.backbone.registration.name,
        "method": config.balancer.registration.name,
        "method_name": state.balancer.get_name(),
        "seed": config.run.seed,
        "protocol": data.protocol,
        "data_source": data.data_source,
        "best_epoch": state.best.epoch,
        "epochs_run": state.epoch + 1,
        "skipped_steps": state.skipped_steps,
        "stopped": stopped,
        "key_metric": data.key_metric,
        "key_metric_mode": data.key_metric_mode,
        "metrics": watched_best,
        "final_metrics": watched_final,
    }
    if data.validation is not None:
        final = state.ema.module
        best = WeightEMA(state.model, 0.0).module
        best.load_state_dict(safetensors.torch.load(best_weights))
        test = evaluation_batches(config, data.test, device)
        batches = reading(iter(test), config.dataset.name, "test")
        with names_out_of_memory("the evaluation on the test set", "training.eval_batch_size"):
            at_best, at_end = predict([best, final], batches)  # the one time that the test set is read
        results |= {
            "metrics": score(data, at_best),
            "final_metrics": score(data, at_end),
            "validation_metrics": watched_best,
            "final_validation_metrics": watched_final,
        }
    results |= {
        "weights": state.balancer.get_weights(),
        "parameters": parameter_counts(state.model),
        "samples": {
            "train": count_samples(data.train, "training"),
            "validation": 0 if data.validation is None else count_samples(data.validation, "validation"),
            "test": count_samples(data.test, "test"),
        },
        "inputs": describe_inputs(data),
        "facts": dict(data.facts),
        "notices": list(data.notices),
        "precision": config.training.precision,
        "device": device.type,
        "config_hash": config.result_hash(data.data_source, data.protocol),
        "wall_seconds": state.wall_seconds + time.perf_counter() - started,
    }
    results = strict_json(results)
    content = json_bytes(results)
    write_sums(run_dir, content)
    atomic.write_bytes(run_dir / RESULTS, content)
    return results
