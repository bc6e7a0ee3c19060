"""LibMTL's step for the methods that it has, from a checkout; nothing of it is part of this project.

Its weighting classes are mixed with its own hard parameter sharing, and called in the order of its trainer: losses
written into one tensor, gradients zeroed in place, ``backward`` with the default arguments of its command line,
optimizer step; FAMO's second forward pass after it. The trainer's metrics are left out.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from variants import OptimizerForm, Variant, optimizer_of
from workloads import Workload

CLASSES = {
    "fixed": "EW",
    "uncertainty": "UW",
    "dwa": "DWA",
    "rlw": "RLW",
    "gls": "GLS",
    "famo": "FAMO",
    "gradnorm": "GradNorm",
    "mgda": "MGDA",
    "pcgrad": "PCGrad",
    "gradvac": "GradVac",
    "imtl-g": "IMTL",
    "cagrad": "CAGrad",
    "nash-mtl": "Nash_MTL",
    "moco": "MoCo",
    "aligned-mtl": "Aligned_MTL",
    "db-mtl": "DB_MTL",
    "excess-mtl": "ExcessMTL",
    "fairgrad": "FairGrad",
    "upgrad": "UPGrad",
}
AT_FEATURES = ("gradnorm", "mgda")  # with its rep_grad=True as well
ARGUMENTS = {
    "T": 2.0,
    "mgda_gn": "none",
    "GradVac_beta": 0.5,
    "GradVac_group_type": 0,
    "alpha": 1.5,
    "calpha": 0.5,
    "rescale": 1,
    "update_weights_every": 1,
    "optim_niter": 20,
    "max_norm": 1.0,
    "MoCo_beta": 0.5,
    "MoCo_beta_sigma": 0.5,
    "MoCo_gamma": 0.1,
    "MoCo_gamma_sigma": 0.5,
    "MoCo_rho": 0,
    "DB_beta": 0.9,
    "DB_beta_sigma": 0,
    "robust_step_size": 1e-2,
    "FairGrad_alpha": 1.0,
    "FAMO_w_lr": 0.025,
    "FAMO_w_gamma": 1e-3,
    "UPGrad_norm_eps": 1e-4,
    "UPGrad_reg_eps": 1e-4,
}


def use_checkout(folder: Path) -> None:
    """Make the checkout's parts importable one by one, without its trainer and what that needs.

    Raises:
        FileNotFoundError: there is no LibMTL in the folder.
    """
    package = folder / "LibMTL"
    if not (package / "weighting" / "abstract_weighting.py").is_file():
        raise FileNotFoundError(
            f"no LibMTL checkout in {folder}: LibMTL/weighting/abstract_weighting.py is missing"
        )
    for name in ("LibMTL", "LibMTL.architecture", "LibMTL.weighting"):
        module = types.ModuleType(name)
        module.__path__ = [str(package / Path(*name.split(".")[1:]))]
        sys.modules[name] = module


def steps(workload: Workload, form: OptimizerForm, method: str, *, at_features: bool) -> Iterator[None]:
    """Take LibMTL's steps."""
    trunk, heads, _ = workload.fresh_model()
    device = workload.inputs.device
    sharing: Any = importlib.import_module("LibMTL.architecture.HPS").HPS
    weighting: Any = getattr(importlib.import_module(f"LibMTL.weighting.{CLASSES[method]}"), CLASSES[method])
    kind = type("Model", (sharing, weighting), {})
    count = len(workload.tasks)
    model: Any = kind(list(workload.tasks), lambda: trunk, heads, at_features, False, device)
    model.init_param()
    model.to(device).train()
    model.epoch, model.epochs, model.train_loss_buffer = 2, 4, np.ones((count, 4))  # past the first epochs
    optimizer = optimizer_of(model.parameters(), form)

    def losses() -> Tensor:
        found = workload.losses(model(workload.inputs))
        vector = torch.zeros(count).to(device)
        for index, loss in enumerate(found.values()):
            vector[index] = loss
        return vector

    while True:
        vector = losses()
        optimizer.zero_grad(set_to_none=False)
        model.backward(vector, **ARGUMENTS)
        optimizer.step()
        if method == "famo":
            with torch.no_grad():
                model.update_w(losses().detach())
        yield


def _variant(method: str, *, at_features: bool) -> Variant:
    def of(workload: Workload, optimizer: OptimizerForm) -> Iterator[None]:
        return steps(workload, optimizer, method, at_features=at_features)

    return Variant("LibMTL", method, "features" if at_features else "", of)


def variants(wanted: tuple[str, ...] | list[str]) -> list[Variant]:
    """Return LibMTL's variants of the wanted methods; ``use_checkout`` comes first."""
    chosen = [method for method in CLASSES if method in wanted]
    at_features = [method for method in AT_FEATURES if method in wanted]
    return [
        *(_variant(method, at_features=False) for method in chosen),
        *(_variant(method, at_features=True) for method in at_features),
    ]
