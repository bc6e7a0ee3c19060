"""Using what a run has trained: loading it, predicting with it, exporting it."""

from mtlbalance.inference.loaded_run import LoadedRun, load_run

__all__ = ["LoadedRun", "load_run"]
