"""What balancing costs on N ranks: a small model of passes, sums over ranks, memory and time of one step.

    python benchmarks/cost_model.py --parameters 1e9 --ranks 64 --tasks 4

Passes, sums and bytes follow from the code, and scaling_check.py holds them to what real ranks do. Times follow from
assumptions, each a named constant here or in hardware.py, and are estimates. scaling_page.py writes the tables of
docs/scaling.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hardware import (
    FLOPS_SHARE,
    GPU_BYTES,
    MEMORY_BYTES_PER_S,
    PEAK_FLOPS,
    RESERVED_BYTES,
    Hardware,
    ring_bytes,
)
from measuring import markdown_header, markdown_row

from mtlbalance.balancers.ranks import SENT_TOGETHER_BYTES

# ------------------------------------------------- assumptions on the training
FORWARD_FLOPS, BACKWARD_FLOPS = 2.0, 4.0  # for each use of a weight: a multiply-add; two of them backward
ADAM_TRAFFIC_NUMBERS = 7.0  # AdamW reads p, g, m, v and writes p, m, v
GRADIENT_BYTES = 4  # float32 parameters under bfloat16 autocast have float32 gradients
ADAM_BYTES = 12.0  # a parameter and its two averages, float32
DDP_BUCKET_BYTES = 4.0  # DDP's copy of the gradients
FSDP_SENT_BYTES = 2  # a parameter, gathered as bfloat16; its gradient is reduced as float32
FSDP_GROUPS = 32  # the trunk's layers, each gathered by itself

SUM_BYTES = 8  # small sums are float64
PRODUCT_BLOCK_BYTES = 2**22 * 8.0  # the most that a Gramian copies to float64 at a time

Reads = Literal["nothing", "losses", "norms", "gramian", "jacobian"]
Wrapper = Literal["DDP", "FSDP2"]
Delivery = Literal["direct", "weighted_sum", "low_memory"]


@dataclass(frozen=True)
class Job:
    """What is trained, and on how many ranks.

    Args:
        tasks: K.
        shared_numbers: P, numbers in the parameters of the trunk.
        head_numbers: of all heads together.
        feature_numbers: B·F, numbers in one rank's features, where trunk meets heads.
        ranks: N.
        uses: how often one rank uses each shared weight in a step: samples times positions.
    """

    tasks: int
    shared_numbers: float
    head_numbers: float
    feature_numbers: float
    ranks: int
    uses: float


@dataclass(frozen=True)
class Option:
    """One way to balance.

    Args:
        name: as the page calls it.
        method: the registered balancer that scaling_check.py runs for it; empty for the plain sum.
        reads: what the method weighs.
        at_features: ``shared_params`` are the features.
        mean_norms: ``sync="norms"``.
        delivery: as the argument; what is not direct probes first, and then differentiates the weighted sum.
        update_every: as the argument.
        read_share: the share of the trunk's numbers that ``shared_params`` has, counted from the heads down.
        held_copies: for a method that reads the Jacobian, ``extra_memory`` of its class at this K.
    """

    name: str
    method: str
    reads: Reads
    at_features: bool = False
    mean_norms: bool = False
    delivery: Delivery = "direct"
    update_every: int = 1
    read_share: float = 1.0
    held_copies: float = 0.0

    @property
    def measures(self) -> bool:
        """Whether it reads gradients at all."""
        return self.reads not in ("nothing", "losses")

    @property
    def one_pass(self) -> bool:
        """Whether the trunk is passed once, so that DDP sends while it is passed."""
        return not self.measures or self.at_features

    @property
    def works_with_fsdp(self) -> bool:
        """Whether it can be used with sharded parameters, whose task gradients nobody gets to see."""
        return self.one_pass


PLAIN = Option("plain sum", "", "nothing")
LOSSES = Option("loss-reading method", "dwa", "losses")
EXACT = Option("GABA, exact", "gaba", "norms")
EXACT_RESUMMED = Option('GABA, exact, `delivery="weighted_sum"`', "gaba", "norms", delivery="weighted_sum")
LOW_MEMORY = Option('GABA, exact, `delivery="low_memory"`', "gaba", "norms", delivery="low_memory")
NORMS = Option('GABA, `sync="norms"`', "gaba", "norms", mean_norms=True)
FEATURES = Option("GABA at the features", "gaba", "norms", at_features=True)
EVERY_10TH = Option("GABA, exact, `update_every=10`", "gaba", "norms", update_every=10)
EVERY_10TH_LOW_MEMORY = Option(
    'GABA, exact, `delivery="low_memory"`, `update_every=10`',
    "gaba",
    "norms",
    delivery="low_memory",
    update_every=10,
)
LAST_LAYERS = Option(
    "GABA, exact, on the last layer", "gaba", "norms", delivery="weighted_sum", read_share=0.03
)
GRAMIAN = Option("Gramian method, exact", "upgrad", "gramian")
GRAMIAN_LOW_MEMORY = Option(
    'Gramian method, exact, `delivery="low_memory"`', "upgrad", "gramian", delivery="low_memory"
)
GRAMIAN_NORMS = Option('Gramian method, `sync="norms"`', "upgrad", "gramian", mean_norms=True)
GRAMIAN_FEATURES = Option("Gramian method at the features", "upgrad", "gramian", at_features=True)
STREAMING = Option("Jacobian method that streams (GradDrop)", "graddrop", "jacobian", held_copies=3)
OPTIONS = (
    PLAIN,
    LOSSES,
    EXACT,
    EXACT_RESUMMED,
    LOW_MEMORY,
    NORMS,
    FEATURES,
    EVERY_10TH,
    EVERY_10TH_LOW_MEMORY,
    LAST_LAYERS,
    GRAMIAN,
    GRAMIAN_LOW_MEMORY,
    GRAMIAN_NORMS,
    GRAMIAN_FEATURES,
    STREAMING,
)


@dataclass(frozen=True)
class Cost:
    """What a step costs one rank, on average over ``update_every`` steps; memory at its peak.

    Args:
        passes: backward passes through the whole trunk.
        sums: all-reduces that the balancer makes.
        balancer_bytes: the size of what it all-reduces.
        wrapper_bytes: the size of what DDP all-reduces, or FSDP2 gathers and reduces.
        sent_bytes: what the rank sends for both.
        extra_bytes: the most memory beyond what the plain sum has.
        total_bytes: parameters, gradients, Adam's averages, the wrapper's copies, and the extra.
        seconds: of the step.
    """

    passes: float
    sums: float
    balancer_bytes: float
    wrapper_bytes: float
    sent_bytes: float
    extra_bytes: float
    total_bytes: float
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether a GPU has room for it."""
        return self.total_bytes <= GPU_BYTES - RESERVED_BYTES


def balancer_sums(option: Option, job: Job, *, measured: bool) -> list[int]:
    """Return the size in bytes of each all-reduce of one call, in order: what ``balancers/ranks.py`` makes."""
    if job.ranks == 1 or not option.method:
        return []
    losses_and_presence = 2 * job.tasks * SUM_BYTES
    if not (option.measures and measured):
        return [losses_and_presence]
    small = (job.tasks**2 if option.reads == "gramian" else job.tasks) * SUM_BYTES
    if option.at_features or option.mean_norms:
        return [losses_and_presence, small]
    gradient = round(option.read_share * job.shared_numbers) * GRADIENT_BYTES
    if (
        option.delivery == "low_memory"
    ):  # which asks for representations' norms or products whether there are any or not
        return [losses_and_presence, *[gradient] * probes(option, job), small]
    if option.reads == "jacobian":
        return [losses_and_presence, *[gradient] * probes(option, job)]
    together = min(job.tasks, max(1, math.ceil(SENT_TOGETHER_BYTES / gradient)))
    whole, rest = divmod(job.tasks, together)
    return [losses_and_presence, *[together * gradient] * whole, *[rest * gradient] * bool(rest)]


def probes(option: Option, job: Job) -> int:
    """Return how many task gradients a measured call differentiates: of pairs that are not kept, some anew."""
    if option.delivery == "low_memory" and option.reads == "gramian":
        return job.tasks * (job.tasks + 1) // 2 - 1
    return job.tasks


def trunk_passes(option: Option, job: Job, *, measured: bool) -> float:
    """Return how often the whole trunk is passed backward."""
    if option.one_pass or not measured:
        return 1.0
    return probes(option, job) * option.read_share + (option.delivery != "direct")


def extra_bytes(option: Option, job: Job) -> float:
    """Return the most bytes of gradients beyond the trunk's one copy that the plain sum has, too."""
    copy = GRADIENT_BYTES * job.shared_numbers
    if option.at_features:
        return GRADIENT_BYTES * job.tasks * job.feature_numbers
    if option.one_pass:
        return 0.0
    if option.reads == "jacobian":
        return option.held_copies * copy
    kept = job.tasks * option.read_share * copy
    new = option.read_share * copy  # a task's own gradient, on its way to where it is averaged over ranks
    if option.delivery == "low_memory":
        kept, new = (2 * copy if option.reads == "gramian" else copy), copy
    measuring = kept + new if job.ranks > 1 and not option.mean_norms else kept
    if option.reads == "gramian":
        rows = 2 if option.delivery == "low_memory" else job.tasks
        measuring = max(measuring, kept + min(PRODUCT_BLOCK_BYTES, SUM_BYTES * rows * job.shared_numbers))
    delivering = kept if option.delivery == "direct" else 0.0  # held while their sum is made
    return max(0.0, measuring - copy, delivering)


def traffic_copies(option: Option, job: Job) -> float:
    """Return how many copies of the trunk's gradients are read or written in memory for what is measured: roughly."""
    if option.one_pass:
        return 0.0
    copies = 5.0 if option.reads == "gramian" else 1.0  # read for norms; or cast to float64, and read twice
    copies += 3.0 if option.delivery == "direct" else 0.0  # weighted and added
    copies += 5.0 if job.ranks > 1 and not option.mean_norms else 0.0  # zeros, copied in, divided
    return copies * probes(option, job) * option.read_share


def cost(option: Option, job: Job, hardware: Hardware, wrapper: Wrapper = "DDP") -> Cost:
    """Return what a step costs one rank.

    Args:
        option: how it is balanced.
        job: what is trained.
        hardware: what it is trained on.
        wrapper: DDP (one rank: nothing), or FSDP2, which only some options can be used with.
    """
    if wrapper == "FSDP2" and not option.works_with_fsdp:
        raise ValueError(f"{option.name} reads parameters, and sharded ones are refused")
    every = option.update_every
    sums = [balancer_sums(option, job, measured=call == 0) for call in range(every)]
    size_bytes = sum(map(sum, sums)) / every
    wrapper_bytes, wrapper_sent = _sent_by(wrapper, job)
    extra = extra_bytes(option, job)
    return Cost(
        passes=sum(trunk_passes(option, job, measured=call == 0) for call in range(every)) / every,
        sums=sum(map(len, sums)) / every,
        balancer_bytes=size_bytes,
        wrapper_bytes=wrapper_bytes,
        sent_bytes=ring_bytes(size_bytes, job.ranks) + wrapper_sent,
        extra_bytes=extra,
        total_bytes=_standing_bytes(wrapper, job) + extra,
        seconds=sum(_seconds(option, job, hardware, wrapper, measured=call == 0) for call in range(every))
        / every,
    )


def ratio(option: Option, job: Job, hardware: Hardware, wrapper: Wrapper = "DDP") -> float:
    """Return the time of a step as a ratio to the plain sum's on the same ranks."""
    return cost(option, job, hardware, wrapper).seconds / cost(PLAIN, job, hardware, wrapper).seconds


def _sends_while_passing(option: Option) -> bool:
    """Return whether gradients are sent while those of the next tasks are computed."""
    one_at_a_time = option.delivery == "low_memory" or option.reads == "jacobian"
    return option.measures and not (option.at_features or option.mean_norms or one_at_a_time)


def _sent_by(wrapper: Wrapper, job: Job) -> tuple[float, float]:
    """Return the bytes that the wrapper moves, and those that a rank sends for it."""
    numbers = job.shared_numbers + job.head_numbers
    if job.ranks == 1:
        return 0.0, 0.0
    if wrapper == "DDP":  # the shared gradients, too, although direct delivery made them alike on all ranks
        return GRADIENT_BYTES * numbers, ring_bytes(GRADIENT_BYTES * numbers, job.ranks)
    moved = (2 * FSDP_SENT_BYTES + GRADIENT_BYTES) * numbers  # gathered forward and backward, then reduced
    return moved, moved * (job.ranks - 1) / job.ranks


def _standing_bytes(wrapper: Wrapper, job: Job) -> float:
    """Return what a rank holds with the plain sum, without activations."""
    numbers = job.shared_numbers + job.head_numbers
    if wrapper == "FSDP2":
        whole = 2 * (FSDP_SENT_BYTES + GRADIENT_BYTES) * numbers / FSDP_GROUPS  # this layer, and the next
        return (ADAM_BYTES + GRADIENT_BYTES) * numbers / job.ranks + whole
    return (ADAM_BYTES + GRADIENT_BYTES + (DDP_BUCKET_BYTES if job.ranks > 1 else 0.0)) * numbers


def _seconds(option: Option, job: Job, hardware: Hardware, wrapper: Wrapper, *, measured: bool) -> float:
    """Return the time of one step.

    The wrapper sends while the trunk is passed, at its best; with direct delivery nothing is left to pass while DDP
    sends. The balancer sends gradients while those of the next tasks are computed, except where they are taken one at
    a time; nothing hides its small sums.
    """
    flops = PEAK_FLOPS * FLOPS_SHARE
    numbers = job.shared_numbers + job.head_numbers
    forward_s = FORWARD_FLOPS * job.uses * numbers / flops
    heads_s = BACKWARD_FLOPS * job.uses * job.head_numbers / flops
    pass_s = BACKWARD_FLOPS * job.uses * job.shared_numbers / flops
    optimizer_numbers = numbers / (job.ranks if wrapper == "FSDP2" else 1)
    update_s = ADAM_TRAFFIC_NUMBERS * 4 * optimizer_numbers / MEMORY_BYTES_PER_S
    sums = balancer_sums(option, job, measured=measured)
    sums_s = sum(hardware.sum_seconds(size, job.ranks) for size in sums)
    if _sends_while_passing(option) and len(sums) > 1:
        gradient = sum(sums[1:]) / job.tasks
        done_s = 0.0
        for index, size in enumerate(sums[1:], start=2):
            ready_s = pass_s * option.read_share * sum(sums[1:index]) / gradient
            done_s = max(done_s, ready_s) + hardware.sum_seconds(size, job.ranks)
        waited_s = done_s - pass_s * option.read_share * job.tasks  # after the last pass
        sums_s = hardware.sum_seconds(sums[0], job.ranks) + waited_s
    if wrapper == "FSDP2":
        sent = (job.ranks - 1) / job.ranks * numbers
        gather_s = FSDP_GROUPS * hardware.send_seconds(FSDP_SENT_BYTES * sent / FSDP_GROUPS, job.ranks)
        reduce_s = FSDP_GROUPS * hardware.send_seconds(GRADIENT_BYTES * sent / FSDP_GROUPS, job.ranks)
        again_s = (
            gather_s / FSDP_GROUPS if option.at_features else 0.0
        )  # fetched ahead for a probe, then let go
        return (
            max(forward_s, gather_s)
            + heads_s
            + max(pass_s, gather_s + reduce_s)
            + update_s
            + sums_s
            + again_s
        )
    passes = trunk_passes(option, job, measured=measured)
    ddp_s = hardware.sum_seconds(GRADIENT_BYTES * numbers, job.ranks)
    direct = measured and not option.one_pass and option.delivery == "direct"
    passing_s = passes * pass_s + ddp_s if direct else (passes - 1) * pass_s + max(pass_s, ddp_s)
    copies = traffic_copies(option, job) if measured else 0.0
    moving_s = copies * GRADIENT_BYTES * job.shared_numbers / MEMORY_BYTES_PER_S
    return forward_s + heads_s + passing_s + update_s + sums_s + moving_s


def main(argv: Sequence[str] | None = None) -> None:
    """Print every option's cost for one job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--parameters", type=float, default=1e9, help="shared ones, P")
    parser.add_argument("--head-parameters", type=float, default=1e5, help="of all heads together")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument(
        "--uses", type=float, default=16384, help="samples times positions of a rank and step"
    )
    parser.add_argument("--feature-width", type=int, default=4096, help="numbers of a feature for each use")
    parser.add_argument("--links", type=int, default=8, help="400 Gb/s links of a node of eight GPUs")
    parser.add_argument("--wrapper", choices=("DDP", "FSDP2"), default="DDP")
    args = parser.parse_args(argv)
    features = args.uses * args.feature_width
    job = Job(args.tasks, args.parameters, args.head_parameters, features, args.ranks, args.uses)
    hardware = Hardware(args.links)
    print(
        markdown_header(
            ["", "passes", "sums", "GB sent by a rank", "extra GB", "GB in all", "seconds", "ratio"]
        )
    )
    for option in OPTIONS:
        if args.wrapper == "FSDP2" and not option.works_with_fsdp:
            print(markdown_row([option.name, *["refused"] * 7]))
            continue
        found = cost(option, job, hardware, args.wrapper)
        gigabytes = (found.sent_bytes, found.extra_bytes, found.total_bytes)
        cells = [f"{found.passes:.3g}", f"{found.sums:.3g}", *(f"{value / 1e9:.3g}" for value in gigabytes)]
        slower = ratio(option, job, hardware, args.wrapper)
        print(markdown_row([option.name, *cells, f"{found.seconds:.3g}", f"{slower:.2f}"]))


if __name__ == "__main__":
    main()
