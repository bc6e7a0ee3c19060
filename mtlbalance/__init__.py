"""mtlbalance: multi-task loss balancing for PyTorch.

``from mtlbalance import GABALoss`` needs torch alone; what trains whole runs is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mtlbalance.errors import MtlBalanceError

if TYPE_CHECKING:
    from mtlbalance.balancers.aligned_mtl import AlignedMTLLoss
    from mtlbalance.balancers.amnl import AMNLLoss
    from mtlbalance.balancers.base import Balancer
    from mtlbalance.balancers.cagrad import CAGradLoss
    from mtlbalance.balancers.dualproj import DualProjLoss
    from mtlbalance.balancers.fairgrad import FairGradLoss
    from mtlbalance.balancers.fixed import FixedWeightLoss
    from mtlbalance.balancers.gaba import GABALoss
    from mtlbalance.balancers.grace import GRACELoss
    from mtlbalance.balancers.imtl_g import IMTLGLoss
    from mtlbalance.balancers.mgda import MGDALoss
    from mtlbalance.balancers.nash_mtl import NashMTLLoss
    from mtlbalance.balancers.pcgrad import PCGradLoss
    from mtlbalance.balancers.sample_weights import failure_weights
    from mtlbalance.balancers.signals import task_gradient_norms
    from mtlbalance.balancers.upgrad import UPGradLoss

__version__ = "0.1.0"

__all__ = [
    "AMNLLoss",
    "AlignedMTLLoss",
    "Balancer",
    "CAGradLoss",
    "DualProjLoss",
    "FairGradLoss",
    "FixedWeightLoss",
    "GABALoss",
    "GRACELoss",
    "IMTLGLoss",
    "MGDALoss",
    "MtlBalanceError",
    "NashMTLLoss",
    "PCGradLoss",
    "UPGradLoss",
    "__version__",
    "failure_weights",
    "task_gradient_norms",
]

_HOME = {
    "AlignedMTLLoss": "mtlbalance.balancers.aligned_mtl",
    "AMNLLoss": "mtlbalance.balancers.amnl",
    "Balancer": "mtlbalance.balancers.base",
    "CAGradLoss": "mtlbalance.balancers.cagrad",
    "DualProjLoss": "mtlbalance.balancers.dualproj",
    "failure_weights": "mtlbalance.balancers.sample_weights",
    "FairGradLoss": "mtlbalance.balancers.fairgrad",
    "FixedWeightLoss": "mtlbalance.balancers.fixed",
    "GABALoss": "mtlbalance.balancers.gaba",
    "GRACELoss": "mtlbalance.balancers.grace",
    "IMTLGLoss": "mtlbalance.balancers.imtl_g",
    "MGDALoss": "mtlbalance.balancers.mgda",
    "NashMTLLoss": "mtlbalance.balancers.nash_mtl",
    "PCGradLoss": "mtlbalance.balancers.pcgrad",
    "task_gradient_norms": "mtlbalance.balancers.signals",
    "UPGradLoss": "mtlbalance.balancers.upgrad",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mtlbalance' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
