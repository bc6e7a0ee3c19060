"""The C library's memory: whether what a step frees is there for the next one, or has to be asked for again."""

from __future__ import annotations

import ctypes
import sys

# mallopt's numbers, from malloc.h, and what it is told.
_KEPT_BYTES = 2**30
_SETTINGS = {
    "M_TRIM_THRESHOLD": (-1, _KEPT_BYTES),
    "M_TOP_PAD": (-2, 2**26),
    "M_MMAP_THRESHOLD": (-3, _KEPT_BYTES),
}


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for this process, so that a training step need not ask for it anew.

    Use it once, before the first step on a CPU, where tensors are larger than some 100 kB: glibc returns such blocks to
    the system as soon as they are freed, and the next step faults every page in again. In a run it is
    ``run.keep_freed_memory = true``.

    Blocks up to 1 GiB then come from the heap, which is trimmed only where more than that is free at its end, and grows
    by 64 MiB. It lasts until the process ends, which holds what it once needed at its peak: leave it out where
    several processes share little memory.

    Returns:
        Whether it was done: True on Linux with glibc, False on other systems, which are left as they are.

    Example:
        >>> keep_freed_memory() in (True, False)
        True

    Source: mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return all(mallopt(number, value) == 1 for number, value in _SETTINGS.values())
