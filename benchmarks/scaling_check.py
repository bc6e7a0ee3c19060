"""Is cost_model.py true? Real ranks (gloo, on this machine) count what they send, pass and hold.

    python benchmarks/scaling_check.py                    # 1 to 4 ranks
    python benchmarks/scaling_check.py --page docs/scaling.md

Every collective of a step is seen where torch dispatches it: the balancer's, those of DistributedDataParallel and
those of FSDP2. Counts and bytes must be the model's to the byte, else the exit code is 1; bytes that are alive are
compared in copies of the trunk's gradients, and times are only shown (scaling.py --only ranks measures them).
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cost_model
import methods
import torch
import torch.distributed as dist
import workloads
from cost_model import OPTIONS, PLAIN, Job, Option, balancer_sums, extra_bytes, trunk_passes
from hardware import ring_bytes
from live_bytes import live_bytes
from measuring import markdown_header, markdown_row, paired_ratio, write_json
from rank_steps import WithLosses
from scaling_page import with_block
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

_COLLECTIVES = ("allreduce_", "_allgather_base_", "_reduce_scatter_base_", "broadcast_")
_SETTLING_STEPS = 2  # DDP builds its buckets anew after the first


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each collective, and the bytes of the whole that it gathers or reduces."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note and pass on."""
        name = func.name().removeprefix("c10d::")
        if func.namespace == "c10d" and name in _COLLECTIVES:
            tensors = [tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg])]
            sizes = [each.numel() * each.element_size() for each in tensors if isinstance(each, Tensor)]
            self.seen.append((name, sum(sizes) if name == "allreduce_" else max(sizes)))
        return func(*args, **(kwargs or {}))


class Steps:
    """Steps of one rank with one option, each in its two parts: the balancer's call, and the backward pass."""

    def __init__(self, workload: workloads.Workload, option: Option, *, sharded: bool = False) -> None:
        self.workload = workload
        self.option = option
        self.model = WithLosses(workload)
        trunk = self.model.trunk
        self.layers = [layer for layer in trunk.children() if isinstance(layer, nn.Linear)]
        self.shared = list((self.layers[-1] if option.read_share < 1 else trunk).parameters())
        self.parallel: nn.Module = self.model
        if sharded:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for part in (*self.layers, *self.model.heads.children(), self.model):
                fully_shard(part, mesh=mesh)
        elif dist.is_initialized():
            self.parallel = DistributedDataParallel(self.model)
        self.passes = 0
        self.layers[0].register_forward_hook(self._watch)
        self.balancer = (
            methods.make(option.method, workload.tasks, **_options_of(option)) if option.method else None
        )

    def _watch(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.register_hook(self._count)  # type: ignore[no-untyped-call]

    def _count(self, _gradient: Tensor) -> None:
        self.passes += 1

    def forward(self) -> Callable[[], Tensor]:
        """Run the forward pass, and return the balancer's call."""
        for parameter in self.model.parameters():
            parameter.grad = None
        features, losses = self.parallel(self.workload.inputs)
        if self.balancer is None:
            return lambda: torch.stack(list(losses.values())).sum()
        shared = features if self.option.at_features else self.shared
        balancer = self.balancer
        return lambda: balancer(losses, shared_params=shared)

    def step(self) -> None:
        """Take a step; there is no optimizer, which is the same for all options."""
        self.forward()().backward()  # type: ignore[no-untyped-call]

    def counted(self) -> dict[str, Any]:
        """Return what ``update_every`` steps send, by balancer and by wrapper, and how often they pass the trunk."""
        found: dict[str, Any] = {"balancer": [], "wrapper": []}
        self.passes = 0
        for _ in range(self.option.update_every):
            with Collectives() as forward:
                call = self.forward()
            with Collectives() as calling:
                total = call()
            with Collectives() as backward:
                total.backward()  # type: ignore[no-untyped-call]
            found["balancer"] += [[name, size] for name, size in calling.seen]
            found["wrapper"] += [[name, size] for name, size in (*forward.seen, *backward.seen)]
        return found | {"passes": self.passes}

    def held(self) -> int:
        """Return the most bytes that the call and the backward pass of a measured step have alive.

        The median of five: gloo's thread lets go of a tensor a moment sooner or later.
        """
        peaks = []
        for _ in range(5):
            call = self.forward()
            peaks.append(live_bytes(lambda: call().backward(), torch.device("cpu")).peak)  # type: ignore[no-untyped-call]  # noqa: B023
            for _ in range(self.option.update_every - 1):
                self.step()
        return sorted(peaks)[2]


def _options_of(option: Option) -> dict[str, Any]:
    options: dict[str, Any] = {"sync": "norms"} if option.mean_norms else {}
    if option.delivery != "direct" and option.read_share == 1.0:  # the last layer is delivered so by itself
        options["delivery"] = option.delivery
    return options | ({"update_every": option.update_every} if option.update_every > 1 else {})


def workload_of(width: int) -> workloads.Workload:
    """Return what is counted on: four tasks, and a batch so small that the weights are nearly all there is."""
    return workloads.mlp(4, width=width, batch_size=8)


def job_of(workload: workloads.Workload, ranks: int) -> Job:
    """Return the workload as the model knows it."""
    batch, width = len(workload.inputs), WithLosses(workload).trunk(workload.inputs).shape[1]
    heads = len(workload.tasks) * (width + 1)
    return Job(len(workload.tasks), workload.trunk_numbers, heads, batch * width, ranks, batch)


def options_for(workload: workloads.Workload) -> list[Option]:
    """Return the options, with the share that the last layer has of this trunk."""
    last = [layer for layer in WithLosses(workload).trunk.children() if isinstance(layer, nn.Linear)][-1]
    share = sum(parameter.numel() for parameter in last.parameters()) / workload.trunk_numbers
    return [replace(option, read_share=share) if option.read_share < 1 else option for option in OPTIONS]


def one_rank(folder: Path, rank: int, world: int, width: int, rounds: int) -> None:
    """Count as one rank, and write what was found."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload = workload_of(width)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    gc.collect()
    gc.freeze()
    found: dict[str, Any] = {}
    running: dict[str, Steps] = {}
    for option in options_for(workload):
        steps = running[option.name] = Steps(workload, option)
        for _ in range(max(_SETTLING_STEPS, option.update_every)):
            steps.step()
        gc.collect()
        found[option.name] = steps.counted() | {"held": steps.held(), "cpu": []}
        for _ in range(option.update_every - 1):
            steps.step()  # so that the next one measures again
    for _ in range(rounds):
        for name, steps in running.items():
            started = time.process_time()
            for _ in range(10):
                steps.step()
            found[name]["cpu"].append(time.process_time() - started)
    sharded: dict[str, Any] = {}
    if world > 1:
        for option in (PLAIN, cost_model.FEATURES):
            steps = Steps(workload, option, sharded=True)
            for _ in range(_SETTLING_STEPS):
                steps.step()
            sharded[option.name] = steps.counted()
    del running, steps
    gc.collect()  # a wrapper that outlives its process group may abort the process at its end
    write_json(folder / f"{rank}.json", {"DDP": found, "FSDP2": sharded})
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def all_ranks(world: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """Start so many ranks, and return what each found."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-W", "ignore", __file__, "--folder", name, "--world", str(world)]
        command += ["--width", str(width), "--rounds", str(rounds)]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(world)]
        try:
            if any(rank.wait(timeout=1200) for rank in ranks):
                raise RuntimeError(f"one of {world} ranks failed")
        finally:
            for rank in ranks:
                rank.kill()  # those that wait for one that failed
        return [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(world)]


def differences(found: dict[str, Any], option: Option, job: Job) -> list[str]:
    """Return in words where a rank did otherwise than the model says."""
    every = range(option.update_every)
    expected = [size for call in every for size in balancer_sums(option, job, measured=call == 0)]
    reduced = round((job.shared_numbers + job.head_numbers) * cost_model.GRADIENT_BYTES * len(every))
    passes = sum(trunk_passes(option, job, measured=call == 0) for call in every)
    pairs = {
        "sums of the balancer": ([size for _, size in found["balancer"]], expected),
        "bytes of DDP": (sum(size for _, size in found["wrapper"]), reduced if job.ranks > 1 else 0),
        # Of a suffix only the pass that delivers comes down to the first layer.
        "trunk passes": (found["passes"], passes if option.read_share == 1.0 else 1),
    }
    return [
        f"{option.name}: {what}: {was}, not {should}"
        for what, (was, should) in pairs.items()
        if was != should
    ]


def sharded_differences(found: dict[str, Any], job: Job) -> list[str]:
    """Return in words where FSDP2 did otherwise than the model says.

    Expected at the features: the two small sums, and one more gather, of the layer below the heads.
    """
    feature = cost_model.FEATURES
    plain, ours = (found[option.name] for option in (PLAIN, feature))
    sums = Counter(("allreduce_", size) for size in balancer_sums(feature, job, measured=True))
    everything = Counter(tuple(each) for each in (*ours["balancer"], *ours["wrapper"]))
    more = everything - Counter(tuple(each) for each in plain["wrapper"]) - sums
    fewer = Counter(tuple(each) for each in plain["wrapper"]) + sums - everything
    gathers = [size for name, size in plain["wrapper"] if name == "_allgather_base_"]
    layer = max(gathers)  # the last of the trunk is as large as any
    if more != Counter([("_allgather_base_", layer)]) or fewer:
        return [f"FSDP2 at the features: {dict(more)} more and {dict(fewer)} fewer than the plain sum"]
    return []


def rows(results: dict[int, dict[str, Any]], width: int) -> list[str]:
    """Return the table of what was counted with the most ranks."""
    world = max(results)
    workload = workload_of(width)
    job = job_of(workload, world)
    copy = cost_model.GRADIENT_BYTES * job.shared_numbers
    found = results[world]
    lines = [
        markdown_header(
            [f"{world} ranks, K = 4", "sums a step", "summed by the balancer", "summed by DDP", "sent by a rank",
             "trunk passes", "copies held beyond the plain sum's (model)", "CPU time of a step"]
        )
    ]  # fmt: skip
    for option in options_for(workload):
        seen = found[option.name]
        every = option.update_every
        sums, wrapper = [size for _, size in seen["balancer"]], [size for _, size in seen["wrapper"]]
        held = (seen["held"] - found[PLAIN.name]["held"]) / copy
        cells = [
            f"{len(sums) / every:.3g}",
            f"{sum(sums) / every:,.0f} B",
            f"{sum(wrapper) / every:,.0f} B",
            f"{ring_bytes((sum(sums) + sum(wrapper)) / every, world) / copy:.2f} copies",
            f"{seen['passes'] / every:.3g}",
            f"{held:.1f} ({extra_bytes(option, job) / copy:.1f})",
            str(paired_ratio(seen["cpu"], found[PLAIN.name]["cpu"])) if seen["cpu"] else "",
        ]
        lines.append(markdown_row([option.name, *cells]))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks, compare, print the table; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--width", type=int, default=512, help="of the three layers of the trunk")
    parser.add_argument("--rounds", type=int, default=3, help="of ten steps, for the times; 0: none")
    parser.add_argument("--page", type=Path, help="write the table into this file, between its markers")
    parser.add_argument("--out", type=Path, help="write what was counted to this JSON file")
    for name, kind in (("--folder", Path), ("--rank", int), ("--world", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.folder is not None:
        one_rank(args.folder, args.rank, args.world, args.width, args.rounds)
        return 0
    results: dict[int, dict[str, Any]] = {}
    wrong: list[str] = []
    workload = workload_of(args.width)
    for world in args.ranks:
        job = job_of(workload, world)
        ranks = all_ranks(world, args.width, args.rounds)
        for rank, found in enumerate(ranks):
            said = [line for option in options_for(workload)
                    for line in differences(found["DDP"][option.name], option, job)]  # fmt: skip
            said += sharded_differences(found["FSDP2"], job) if world > 1 else []
            wrong += [f"rank {rank} of {world}: {line}" for line in said]
        results[world] = ranks[0]["DDP"]
    write_json(args.out, {"ranks": {str(world): found for world, found in results.items()}, "wrong": wrong})
    table = "\n".join(rows(results, args.width))
    print(table)
    if args.page is not None:
        args.page.write_text(
            with_block(args.page.read_text(encoding="utf-8"), "check", table), encoding="utf-8"
        )
    print("\n".join(wrong) or "counts and bytes are the model's", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
