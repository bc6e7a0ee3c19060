"""The options by which methods and peers are chosen, alike in every script that compares them."""

from __future__ import annotations

import argparse
from pathlib import Path

import methods
import peer_libmtl
import peer_torchjd
import torch
from variants import BATCHED, FLOORS, Variant, own_variants

PEERS = ("torchjd", "libmtl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=methods.METHODS,
        default=list(methods.METHODS),
        metavar="METHOD",
        help="config names; default: all of them",
    )
    parser.add_argument(
        "--batched", action="store_true", help="also the trunk passed once for all tasks; meant for GPUs"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[], help="measure these beside")
    parser.add_argument(
        "--libmtl", type=Path, metavar="PATH", help="a checkout of LibMTL, for --peers libmtl"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")


def chosen_variants(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *, timed: bool = True
) -> list[Variant]:
    """Return the floors, the methods, and the peers that were asked for; end with what is missing."""
    batched = [variant for variant in BATCHED if args.batched and variant.method in args.methods]
    found = [*FLOORS, *own_variants(args.methods), *batched]
    if "torchjd" in args.peers:
        if not peer_torchjd.INSTALLED:
            parser.error(
                "--peers torchjd: torchjd is not installed (it is one of the development dependencies)"
            )
        found += peer_torchjd.variants(args.methods, timed=timed)
    if "libmtl" in args.peers:
        if args.libmtl is None:
            parser.error("--peers libmtl needs --libmtl PATH, a checkout of LibMTL")
        try:
            peer_libmtl.use_checkout(args.libmtl)
        except FileNotFoundError as error:
            parser.error(str(error))
        found += peer_libmtl.variants(args.methods)
    return found
