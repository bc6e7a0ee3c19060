"""mtlbalance: multi-task loss balancing for PyTorch.

``from mtlbalance import GABALoss`` needs torch alone; what trains whole runs is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mtlbalance.errors import MtlBalanceError

if TYPE_CHECKING:
    from mtlbalance.balancers.amnl import AMNLLoss
    from mtlbalance.balancers.base import Balancer
    from mtlbalance.balancers.fixed import FixedWeightLoss
    from mtlbalance.balancers.gaba import GABALoss
    from mtlbalance.balancers.grace import GRACELoss
    from mtlbalance.balancers.sample_weights import failure_weights
    from mtlbalance.balancers.signals import task_gradient_norms

__version__ = "0.1.0"

__all__ = [
    "AMNLLoss",
    "Balancer",
    "FixedWeightLoss",
    "GABALoss",
    "GRACELoss",
    "MtlBalanceError",
    "__version__",
    "failure_weights",
    "task_gradient_norms",
]

_HOME = {
    "AMNLLoss": "mtlbalance.balancers.amnl",
    "Balancer": "mtlbalance.balancers.base",
    "FixedWeightLoss": "mtlbalance.balancers.fixed",
    "GABALoss": "mtlbalance.balancers.gaba",
    "GRACELoss": "mtlbalance.balancers.grace",
    "failure_weights": "mtlbalance.balancers.sample_weights",
    "task_gradient_norms": "mtlbalance.balancers.signals",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mtlbalance' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
