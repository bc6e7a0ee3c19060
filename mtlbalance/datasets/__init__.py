"""Datasets: the in-memory form that any plugin can use, and the built-in ``toy``."""

from mtlbalance.datasets.in_memory import InMemoryDataset

__all__ = ["InMemoryDataset"]
