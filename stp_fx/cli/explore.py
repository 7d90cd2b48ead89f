"""``stp-fx explore``: one page for a browser about a model, its groups, and what is removed from it."""

from __future__ import annotations

import argparse
from typing import Any

from stp_fx.cli.arguments import add_command, captured
from stp_fx.cli.files import read_plan
from stp_fx.cli.output import Output, checked_output
from stp_fx.errors import InputError
from stp_fx.explorer import explore
from stp_fx.io import load
from stp_fx.terminal import Text

__all__ = ["add"]


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "explore",
        run,
        "a page that unfolds the model: groups, pinned axes, costs, what is removed",
        """
        Writes one HTML page, which needs no network: the model folded by modules
        (a click unfolds one), groups in colours and by name, what each channel is
        coupled to, why axes are pinned, MACs and parameters of every layer. With
        --pruned or --plan it also shows what is kept, and what that saves. An
        existing page is overwritten.
        """,
        """
        stp-fx explore resnet18 -o report.html
        stp-fx explore resnet18 -o report.html --pruned half.stp --latency
        stp-fx explore net.py:make --input 1,1,28,28 -o report.html
        """,
    )
    group = parser.add_argument_group("the page")
    group.add_argument("--output", "-o", required=True, metavar="FILE", help="the page: .html")
    group.add_argument("--pruned", metavar="PRUNED.stp", help="the pruned MODEL, as `stp-fx prune` or stp_fx.save wrote it")
    group.add_argument("--plan", metavar="FILE.json", help="a plan for MODEL, as `stp-fx prune -o FILE.json` wrote it")
    group.add_argument("--latency", "-l", action="store_true", help="measure the time of every layer")


def run(args: argparse.Namespace, output: Output) -> int:
    target = checked_output(args.output, (".html",), overwrite=True)
    if args.pruned and args.plan:
        raise InputError("--pruned and --plan: give one of them; a pruned model has its plan")
    _, gm, inputs = captured(args, output, args.pruned)
    pruned = None
    if args.pruned:
        with output.stage(f"loading {args.pruned}"):
            pruned = load(args.pruned, gm)
    plan = read_plan(args.plan, gm) if args.plan else None
    with output.stage(f"writing {target}"):
        page = explore(gm, target, pruned=pruned, plan=plan, latency=args.latency, title=args.model)
    request = {"command": "explore", "model": args.model, "inputs": [str(each) for each in inputs]}
    counts = {each: len(page.data[each]) for each in ("boxes", "scopes", "groups")}
    output.result({**request, "output": str(target), **counts}, Text(str(target)))
    return 0
