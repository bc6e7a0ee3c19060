"""The machines of the cost model: what a GPU computes and holds, and what the links between GPUs carry."""

from __future__ import annotations

import math
from dataclasses import dataclass

# An H100 SXM, and nodes of 8.
PEAK_FLOPS = 989e12  # FLOP/s, bfloat16 without sparsity (data sheet)
FLOPS_SHARE = 0.4  # of the peak that training reaches; .38 to .46 are published for large, well tuned runs
MEMORY_BYTES_PER_S = 0.8 * 3.35e12  # HBM3 (data sheet), and what streaming kernels reach of it
GPU_BYTES = 80e9
RESERVED_BYTES = 10e9  # for activations (recomputed), the CUDA context and fragments of the allocator
NODE_RANKS = 8
NVLINK_BYTES_PER_S = 0.8 * 450e9  # NVLink 4, one direction (data sheet), and what a ring reaches of it
LINK_BYTES_PER_S = 0.8 * 50e9  # one 400 Gb/s network link, and what a ring reaches of it
LAUNCH_S = 10e-6  # a collective of a few bytes on one rank: kernel and hand-shake
NVLINK_HOP_S = 2e-6  # each step of a tree within a node
NETWORK_HOP_S = 5e-6  # and between nodes


@dataclass(frozen=True)
class Hardware:
    """What connects the ranks.

    Args:
        links: 400 Gb/s network links of a node of eight GPUs, all of which a large sum uses.
    """

    links: int = 8

    def ring_bytes_per_s(self, ranks: int) -> float:
        """How fast one rank sends in a ring: between nodes all rings together have the node's links."""
        return (
            NVLINK_BYTES_PER_S
            if ranks <= NODE_RANKS
            else min(NVLINK_BYTES_PER_S, self.links * LINK_BYTES_PER_S)
        )

    def send_seconds(self, sent_bytes: float, ranks: int) -> float:
        """One collective in which each rank sends so many bytes."""
        if ranks == 1:
            return 0.0
        hop_s = NVLINK_HOP_S if ranks <= NODE_RANKS else NETWORK_HOP_S
        latency_s = LAUNCH_S + 2 * math.ceil(math.log2(ranks)) * hop_s
        return latency_s + sent_bytes / self.ring_bytes_per_s(ranks)

    def sum_seconds(self, size_bytes: float, ranks: int) -> float:
        """One all-reduce of a tensor of so many bytes."""
        return self.send_seconds(ring_bytes(size_bytes, ranks), ranks)


def ring_bytes(size_bytes: float, ranks: int) -> float:
    """Return what each rank sends in a ring all-reduce of a tensor of so many bytes."""
    return 2 * (ranks - 1) / ranks * size_bytes
