"""What is not alike between a run and the study's runs, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import MULTI_CONDITION_SUBSETS, CnnBiLstmAttentionConfig

STUDY_BACKBONE = "cnn-bilstm-attention"
STUDY_PARAMETERS = 3_497_476
STUDY_EPOCHS = 500
STUDY_PATIENCE = 80
# The row that the study prints for AMNL: each loss divided by its own size.
AMNL_ROW = "AMNL(normalised)"
BASELINE = "Fixed(0.50/0.50)"

_DATASET = {"window": 30, "health_thresholds": [80, 30], "scale_settings_globally": True}
_TRAINING = {
    "batch_size": 256,
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "weight_decay_late": 5e-5,
    "weight_decay_late_epoch": 100,
    "grad_clip": 1.0,
    "warmup_epochs": 10,
    "warmup_start": 0.1,
    "ema_decay": 0.999,
    "patience": STUDY_PATIENCE,
    "scheduler_factor": 0.5,
    "scheduler_patience": 30,
    "scheduler_min_lr": 5e-6,
    "precision": "fp32",
    "matmul_precision": None,
}
_GABA = {"beta": 0.99, "warmup_steps": 100, "min_weight": 0.05, "update_every": 1}
_FAILURE_WEIGHTING = {"biased_task": "rul", "target_cap": 125, "max_weight": 2}
_BALANCERS: Mapping[str, Mapping[str, Any]] = {
    "gaba": _GABA,
    "grace": _GABA | _FAILURE_WEIGHTING,
    "amnl": _FAILURE_WEIGHTING | {"weights": None},
}


def differences_from_study(results: Mapping[str, Any], config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Say what differs, the weightiest first.

    Args:
        results: the content of ``results.json``.
        config: the content of ``config.resolved.toml``, if it is at hand.
    """
    facts = results["facts"]
    sentences = ["This is one run; the study's figures are means over five seeds."]
    if results.get("protocol") == "honest":
        sentences.append(
            "The study picks its best epoch on the test set. This run picked it on held-out training engines "
            f"({facts.get('validation_engines')} of them) and trained on fewer, so it is a stricter figure."
        )
    sentences += _method(results) + _network(results) + _length(results)
    if facts.get("pad") != "all":
        sentences.append("The study pads every row (pad = 'all'); this run pads short engines only.")
    per_condition = facts.get("subset") in MULTI_CONDITION_SUBSETS
    if bool(facts.get("per_condition")) != per_condition:
        where = "within each operating condition" if per_condition else "over all rows together"
        sentences.append(f"On {facts.get('subset')} the study scales sensors {where}; this run does not.")
    if config is None:
        if facts.get("window", _DATASET["window"]) != _DATASET["window"]:
            sentences.append(f"The study's windows have 30 cycles; this run's have {facts['window']}.")
        sentences.append(
            "config.resolved.toml is not beside the results, so dropout, window, learning rate and the other "
            "options were not compared."
        )
    else:
        sentences += _options(results, config)
    return tuple(sentences)


def _method(results: Mapping[str, Any]) -> list[str]:
    method, name = results.get("method"), str(results.get("method_name"))
    if method == "amnl" and name != AMNL_ROW:
        return [
            f"The study's AMNL figures belong to the normalised form (balancer.normalise = true); this run has {name}, "
            "for which it prints none."
        ]
    if method == "fixed" and name != BASELINE:
        return [f"The study's baseline has weights 0.50/0.50; this run has {name}, for which it prints none."]
    return []


def _network(results: Mapping[str, Any]) -> list[str]:
    sentences = []
    if results.get("backbone") != STUDY_BACKBONE:
        sentences.append(
            f"The study's network is {STUDY_BACKBONE!r}; this run has {results.get('backbone')!r}."
        )
    parameters = (results.get("parameters") or {}).get("total")
    if parameters != STUDY_PARAMETERS:
        size = f"{parameters:,}" if isinstance(parameters, int) else "an unknown number of"
        sentences.append(f"The study's network has {STUDY_PARAMETERS:,} parameters; this run's has {size}.")
    return sentences


def _length(results: Mapping[str, Any]) -> list[str]:
    epochs = results.get("epochs_run")
    # A run that ended by the study's patience has more epochs than that; one that ended by its limit has all of them.
    if isinstance(epochs, int) and (
        epochs <= STUDY_PATIENCE or (epochs < STUDY_EPOCHS and results.get("stopped") == "epochs")
    ):
        return [
            f"This run ended after {epochs} epochs; the study trains up to {STUDY_EPOCHS}, and stops "
            f"after {STUDY_PATIENCE} without improvement."
        ]
    return []


def _options(results: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    method = str(results.get("method"))
    backbone: dict[str, Any] = {}
    if results.get("backbone") == STUDY_BACKBONE:
        backbone = CnnBiLstmAttentionConfig().model_dump(mode="json")
        if results.get("method_name") == AMNL_ROW and results["facts"]["subset"] in MULTI_CONDITION_SUBSETS:
            backbone["dropout"] = 0.2  # of the runs behind that row
    study = {
        "dataset": _DATASET,
        "backbone": backbone,
        "balancer": _BALANCERS.get(method, {}),
        "training": _TRAINING,
    }
    sentences = []
    for section, expected in study.items():
        # An option that is unset (None) is absent from TOML.
        given = config.get(section, {})
        unlike = [
            f"{key} = {_shown(given.get(key))} ({_shown(value)})"
            for key, value in expected.items()
            if given.get(key) != value
        ]
        if unlike:
            sentences.append(f"[{section}], with the study's value in brackets: {', '.join(unlike)}.")
    return sentences


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
