"""Training: the trainer with the study's cadence, evaluation, checkpoints and the run folder."""

from mtlbalance.training.run import RunOutcome, run_training

__all__ = ["RunOutcome", "run_training"]
