"""mtlbalance: multi-task loss balancing for PyTorch.

``from mtlbalance import GABALoss`` needs torch alone; what trains whole runs is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mtlbalance.errors import MtlBalanceError

if TYPE_CHECKING:
    from mtlbalance.allocator import keep_freed_memory
    from mtlbalance.balancers.aligned_mtl import AlignedMTLLoss
    from mtlbalance.balancers.amnl import AMNLLoss
    from mtlbalance.balancers.base import Balancer
    from mtlbalance.balancers.cagrad import CAGradLoss
    from mtlbalance.balancers.conflict_free import ConFIGLoss
    from mtlbalance.balancers.cosmos import COSMOSLoss
    from mtlbalance.balancers.cr_mogm import CRMOGMLoss
    from mtlbalance.balancers.db_mtl import DBMTLLoss
    from mtlbalance.balancers.dualproj import DualProjLoss
    from mtlbalance.balancers.dwa import DWALoss
    from mtlbalance.balancers.excess_mtl import ExcessMTLLoss
    from mtlbalance.balancers.fairgrad import FairGradLoss
    from mtlbalance.balancers.famo import FAMOLoss
    from mtlbalance.balancers.fixed import FixedWeightLoss
    from mtlbalance.balancers.gaba import GABALoss
    from mtlbalance.balancers.gls import GLSLoss
    from mtlbalance.balancers.grace import GRACELoss
    from mtlbalance.balancers.grad_drop import GradDropLoss
    from mtlbalance.balancers.gradnorm import GradNormLoss
    from mtlbalance.balancers.gradvac import GradVacLoss
    from mtlbalance.balancers.graphed_step import GraphedStep
    from mtlbalance.balancers.imtl_g import IMTLGLoss
    from mtlbalance.balancers.imtl_l import IMTLLLoss
    from mtlbalance.balancers.krum import KrumLoss
    from mtlbalance.balancers.mgda import MGDALoss
    from mtlbalance.balancers.moco import MoCoLoss
    from mtlbalance.balancers.modo import MoDoLoss
    from mtlbalance.balancers.nash_mtl import NashMTLLoss
    from mtlbalance.balancers.pbi import PBILoss
    from mtlbalance.balancers.pcd import PCDLoss
    from mtlbalance.balancers.pcgrad import PCGradLoss
    from mtlbalance.balancers.rlw import RGWLoss, RLWLoss
    from mtlbalance.balancers.sample_weights import failure_weights
    from mtlbalance.balancers.sdmgrad import SDMGradLoss
    from mtlbalance.balancers.signals import task_gradient_norms
    from mtlbalance.balancers.stch import STCHLoss
    from mtlbalance.balancers.trimmed_mean import TrimmedMeanLoss
    from mtlbalance.balancers.uncertainty import UncertaintyLoss
    from mtlbalance.balancers.upgrad import UPGradLoss
    from mtlbalance.inference.loaded_run import load_run

__version__ = "0.1.0"

__all__ = [
    "AMNLLoss",
    "AlignedMTLLoss",
    "Balancer",
    "CAGradLoss",
    "COSMOSLoss",
    "CRMOGMLoss",
    "ConFIGLoss",
    "DBMTLLoss",
    "DWALoss",
    "DualProjLoss",
    "ExcessMTLLoss",
    "FAMOLoss",
    "FairGradLoss",
    "FixedWeightLoss",
    "GABALoss",
    "GLSLoss",
    "GRACELoss",
    "GradDropLoss",
    "GradNormLoss",
    "GradVacLoss",
    "GraphedStep",
    "IMTLGLoss",
    "IMTLLLoss",
    "KrumLoss",
    "MGDALoss",
    "MoCoLoss",
    "MoDoLoss",
    "MtlBalanceError",
    "NashMTLLoss",
    "PBILoss",
    "PCDLoss",
    "PCGradLoss",
    "RGWLoss",
    "RLWLoss",
    "SDMGradLoss",
    "STCHLoss",
    "TrimmedMeanLoss",
    "UPGradLoss",
    "UncertaintyLoss",
    "__version__",
    "failure_weights",
    "keep_freed_memory",
    "load_run",
    "task_gradient_norms",
]

_HOME = {
    "AlignedMTLLoss": "mtlbalance.balancers.aligned_mtl",
    "AMNLLoss": "mtlbalance.balancers.amnl",
    "Balancer": "mtlbalance.balancers.base",
    "CAGradLoss": "mtlbalance.balancers.cagrad",
    "ConFIGLoss": "mtlbalance.balancers.conflict_free",
    "COSMOSLoss": "mtlbalance.balancers.cosmos",
    "CRMOGMLoss": "mtlbalance.balancers.cr_mogm",
    "DBMTLLoss": "mtlbalance.balancers.db_mtl",
    "DualProjLoss": "mtlbalance.balancers.dualproj",
    "DWALoss": "mtlbalance.balancers.dwa",
    "ExcessMTLLoss": "mtlbalance.balancers.excess_mtl",
    "failure_weights": "mtlbalance.balancers.sample_weights",
    "FairGradLoss": "mtlbalance.balancers.fairgrad",
    "FAMOLoss": "mtlbalance.balancers.famo",
    "FixedWeightLoss": "mtlbalance.balancers.fixed",
    "GABALoss": "mtlbalance.balancers.gaba",
    "GLSLoss": "mtlbalance.balancers.gls",
    "GRACELoss": "mtlbalance.balancers.grace",
    "GradDropLoss": "mtlbalance.balancers.grad_drop",
    "GradNormLoss": "mtlbalance.balancers.gradnorm",
    "GradVacLoss": "mtlbalance.balancers.gradvac",
    "GraphedStep": "mtlbalance.balancers.graphed_step",
    "IMTLGLoss": "mtlbalance.balancers.imtl_g",
    "IMTLLLoss": "mtlbalance.balancers.imtl_l",
    "keep_freed_memory": "mtlbalance.allocator",
    "KrumLoss": "mtlbalance.balancers.krum",
    "load_run": "mtlbalance.inference.loaded_run",
    "MGDALoss": "mtlbalance.balancers.mgda",
    "MoDoLoss": "mtlbalance.balancers.modo",
    "MoCoLoss": "mtlbalance.balancers.moco",
    "NashMTLLoss": "mtlbalance.balancers.nash_mtl",
    "PBILoss": "mtlbalance.balancers.pbi",
    "PCDLoss": "mtlbalance.balancers.pcd",
    "PCGradLoss": "mtlbalance.balancers.pcgrad",
    "RGWLoss": "mtlbalance.balancers.rlw",
    "RLWLoss": "mtlbalance.balancers.rlw",
    "SDMGradLoss": "mtlbalance.balancers.sdmgrad",
    "STCHLoss": "mtlbalance.balancers.stch",
    "task_gradient_norms": "mtlbalance.balancers.signals",
    "TrimmedMeanLoss": "mtlbalance.balancers.trimmed_mean",
    "UncertaintyLoss": "mtlbalance.balancers.uncertainty",
    "UPGradLoss": "mtlbalance.balancers.upgrad",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mtlbalance' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
