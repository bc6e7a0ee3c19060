"""How many bytes are alive: every allocation counted, rather than what the process happens to hold."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

_MEMORY_EVENT = "[memory]"  # torch's name for an allocation or a release in a profile
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says on stderr when it starts and stops


@dataclass(frozen=True)
class LiveBytes:
    """What something did to the bytes that are alive, in comparison with before.

    Args:
        peak: the most at any moment, 0 or more.
        end: at the end; negative where more was released than made.
    """

    peak: int
    end: int


def live_bytes(run: Callable[[], object], device: torch.device) -> LiveBytes:
    """Run something and return what it did to the bytes of tensors that are alive.

    On the CPU torch reports each allocation and release to its profiler, scratch space of kernels included; releases
    of what was made outside of such runs go unseen. Python's garbage collector does not run meanwhile, so what only
    it would release counts as alive.
    """
    gc.disable()
    try:
        return _on_cuda(run, device) if device.type == "cuda" else _on_cpu(run)
    finally:
        gc.enable()


def _on_cpu(run: Callable[[], object]) -> LiveBytes:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    assert profile.profiler is not None
    found = profile.profiler.kineto_results
    assert found is not None
    events = [event for event in found.events() if event.name() == _MEMORY_EVENT]
    levels = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return LiveBytes(max(0, *levels), levels[-1]) if levels else LiveBytes(0, 0)


def _on_cuda(run: Callable[[], object], device: torch.device) -> LiveBytes:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return LiveBytes(peak, torch.cuda.memory_allocated(device) - before)
