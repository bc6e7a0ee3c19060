"""Configs: TOML in, validated models out, every problem reported with its file and line."""

from mtlbalance.config.document import Override
from mtlbalance.config.loading import load_config
from mtlbalance.config.problems import InvalidConfigError, LocatedProblem, Place
from mtlbalance.config.run_config import Choice, RunConfig
from mtlbalance.config.sections import RunSection, TrainingSection

__all__ = [
    "Choice",
    "InvalidConfigError",
    "LocatedProblem",
    "Override",
    "Place",
    "RunConfig",
    "RunSection",
    "TrainingSection",
    "load_config",
]
