"""Ways to make any step cheaper, balanced or not: fused AdamW, compiled modules, bfloat16.

A way is put together of words, ``compiled+fused`` say, and is applied to variants: each is measured as it is and in
every way, all in the same rounds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from variants import PLAIN, OptimizerForm, Variant, by_name
from workloads import Workload

_NOT_IN_WAYS = (
    "K+1 passes",
    "low memory",
    "batched",
    "autogram",
    "fused AdamW",
)  # forms that are measured as they are alone
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of /proc/cpuinfo; the last is Arm's


@dataclass(frozen=True)
class Word:
    """One way, or a part of one.

    Args:
        shown: in the names of variants.
        change: gives the workload that is trained instead.
        missing: says what this machine lacks for it on a device, or nothing.
    """

    shown: str
    change: Callable[[Workload], Workload]
    missing: Callable[[torch.device], str] = lambda _: ""


def _compiled(workload: Workload, *, heads: bool) -> Workload:
    return replace(workload, compiled="trunk and heads" if heads else "trunk")


def _inside(workload: Workload, context: Callable[[], AbstractContextManager[Any]]) -> Workload:
    return replace(workload, contexts=(*workload.contexts, context))


def _in_bf16(workload: Workload) -> Workload:
    return _inside(workload, partial(torch.autocast, workload.inputs.device.type, dtype=torch.bfloat16))


def _with_math_attention(workload: Workload) -> Workload:
    return _inside(workload, partial(sdpa_kernel, SDPBackend.MATH))


def _without_compiler(_: torch.device) -> str:
    return (
        ""
        if any(shutil.which(name) for name in ("g++", "clang++", "c++"))
        else "no C++ compiler is installed"
    )


def _without_bf16(device: torch.device) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if device.type != "cpu" or not cpuinfo.exists() or _BF16_FLAGS & set(cpuinfo.read_text().split()):
        return ""
    return "this CPU has no bfloat16 instructions"


WORDS = {
    "fused": Word("fused AdamW", lambda workload: workload),
    "compiled": Word("compiled", partial(_compiled, heads=True), _without_compiler),
    "compiled-trunk": Word("compiled trunk", partial(_compiled, heads=False), _without_compiler),
    "bf16": Word("bf16", _in_bf16, _without_bf16),
    "math": Word("MATH attention", _with_math_attention),
}


@dataclass(frozen=True)
class Way:
    """How variants are changed: the words in their order."""

    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """As it stands in a variant's name."""
        return ", ".join(WORDS[word].shown for word in self.words)

    def missing(self, device: torch.device) -> str:
        """Return what this machine lacks for it on a device, or nothing."""
        return next(filter(None, (WORDS[word].missing(device) for word in self.words)), "")

    def applied_to(self, variant: Variant) -> Variant:
        """Return the variant in this way; its baseline is the plain sum in this way."""

        def steps(workload: Workload, optimizer: OptimizerForm) -> Iterator[None]:
            for word in self.words:
                workload = WORDS[word].change(workload)
            return variant.steps(workload, "fused" if "fused" in self.words else optimizer)

        form = f"{variant.form}, {self.name}" if variant.form else self.name
        return replace(variant, form=form, steps=steps, plain=f"{PLAIN} ({self.name})")


def parse_way(text: str) -> Way:
    """Return the way that a command line names.

    Raises:
        ValueError: there is no such word.
    """
    words = tuple(text.split("+"))
    if unknown := [word for word in words if word not in WORDS]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(WORDS)}")
    return Way(words)


def in_ways(variants: Sequence[Variant], ways: Sequence[Way]) -> list[Variant]:
    """Return the variants, followed by those of them that are measured in every way; LibMTL's train by themselves."""
    changed = [v for v in variants if v.form not in _NOT_IN_WAYS and v.source != "LibMTL"]
    found = by_name([*variants, *(way.applied_to(variant) for way in ways for variant in changed)])
    return list(found.values())
