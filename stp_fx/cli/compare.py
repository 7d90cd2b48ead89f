"""``stp-fx compare``: a model beside its pruned graph."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from stp_fx.api import compare
from stp_fx.cli.arguments import add_command, captured
from stp_fx.cli.files import CheckFailed
from stp_fx.cli.inputs import named_ratio
from stp_fx.cli.output import Output
from stp_fx.errors import InputError
from stp_fx.io import load
from stp_fx.terminal import Text

__all__ = ["add"]

_COSTS = {"macs": "macs", "params": "params", "size": "bytes", "latency": "seconds"}


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        run,
        "MACs, parameters, size and latency before and after, group by group",
        """
        Compares a model with what `stp-fx prune -o PRUNED.stp` or stp_fx.save has
        written: MACs, parameters, size on disk, the channels of every group, and
        with --latency the time of one call (both models in turn, one process).
        Without --input, MODEL is captured with the inputs that PRUNED.stp recorded.
        """,
        """
        stp-fx compare resnet50 half.stp
        stp-fx compare resnet50 half.stp --latency -i 16,3,224,224 --threads 4
        stp-fx compare resnet50 half.stp --markdown > report.md

        exit code 1 unless both hold:
        stp-fx compare resnet50 half.stp --at-most macs=0.5 --at-most size=0.6
        """,
        usage="stp-fx compare MODEL PRUNED.stp [options]",
    )
    group = parser.add_argument_group("comparison")
    group.add_argument("pruned", metavar="PRUNED.stp", help="the pruned MODEL, as `stp-fx prune` or stp_fx.save wrote it")
    group.add_argument("--latency", "-l", action="store_true", help="measure the time of one call with torch.utils.benchmark")
    group.add_argument("--threads", type=int, metavar="N", help="torch's threads while measuring (default: as it is)")
    group.add_argument("--plot", metavar="FILE", help="bars of the units that every group keeps: .png, .svg (matplotlib)")
    group.add_argument("--markdown", action="store_true", help="tables for a document")
    group.add_argument(
        "--at-most", action="append", type=named_ratio, default=[], metavar="COST=FRACTION",
        help=f"exit with 1 if more than this is left of {', '.join(_COSTS)}; may be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace, output: Output) -> int:
    limits = dict(args.at_most)
    for name in limits:
        if name not in _COSTS:
            raise InputError(f"--at-most: unknown cost {name!r}; known: {', '.join(_COSTS)}")
    if args.markdown and args.json:
        raise InputError("--markdown and --json are two forms of one report: give one of them")
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads must be at least 1; got {args.threads}")
    _, gm, inputs = captured(args, output, args.pruned)
    with output.stage(f"loading {args.pruned}"):
        pruned = load(args.pruned, gm)
    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        with output.stage("comparing"):
            report = compare(gm, pruned, latency=args.latency or "latency" in limits)
    finally:
        torch.set_num_threads(threads)
    if args.plot:
        report.plot(args.plot)
    data = report.to_dict()
    request = {"command": "compare", "model": args.model, "pruned": args.pruned, "inputs": [str(each) for each in inputs]}
    output.result({**request, **data}, Text(report.to_markdown().rstrip(), no_wrap=True) if args.markdown else report)
    broken = [f"{name}: {data[_COSTS[name]]['left']:.4f} is left" for name in limits if data[_COSTS[name]]["left"] > limits[name]]
    if broken:
        asked = ", ".join(f"{name}={limit:g}" for name, limit in limits.items())
        raise CheckFailed(f"{'; '.join(broken)}; --at-most asked for {asked}")
    return 0
