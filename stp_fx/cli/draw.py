"""``stp-fx draw``: pictures of a model's graphs."""

from __future__ import annotations

import argparse
from typing import Any

from stp_fx.api import analyze
from stp_fx.cli.arguments import add_command, captured
from stp_fx.cli.files import read_plan
from stp_fx.cli.output import Output, checked_output
from stp_fx.terminal import Text

__all__ = ["add"]


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "draw",
        run,
        "a picture of which layers lose channels together",
        """
        Draws which layers lose channels together. A box around calls is a group:
        its units are removed together. Graphviz makes .svg, .png and .pdf of it;
        .dot is its text. An existing picture is overwritten. All three views put
        every call at the same place.
        """,
        """
        stp-fx draw resnet18 -o resnet18.svg
        stp-fx draw net.py:make --input 1,1,28,28 -o net.pdf
        stp-fx draw resnet18 -o resnet18.dot
        stp-fx draw swin_t --view combined --fold 3 -o swin.svg
        """,
    )
    group = parser.add_argument_group("the picture")
    group.add_argument("--output", "-o", required=True, metavar="FILE", help=".svg, .png, .pdf or .dot")
    group.add_argument(
        "--view",
        default="dependency",
        metavar="VIEW",
        help="computational (data flow), dependency (layers that lose channels together; default) or combined",
    )
    group.add_argument(
        "--fold",
        type=int,
        metavar="DEPTH",
        help="calls of modules nested deeper than this are one node; 0: every call alone (default: the depth that fits a page)",
    )
    group.add_argument("--plan", metavar="FILE.json", help="a plan for MODEL: captions give the share that it removes")


def run(args: argparse.Namespace, output: Output) -> int:
    target = checked_output(args.output, (".svg", ".png", ".pdf", ".dot"), overwrite=True)
    _, gm, inputs = captured(args, output)
    plan = read_plan(args.plan, gm) if args.plan else None
    with output.stage(f"drawing {target}"):
        written = analyze(gm).draw(target, view=args.view, fold=args.fold, plan=plan)
    request = {"command": "draw", "model": args.model, "inputs": [str(each) for each in inputs]}
    output.result({**request, "view": args.view, "output": str(written)}, Text(str(written)))
    if written != target:
        output.note("note: Graphviz's dot is not installed, so the picture is its text (apt-get install graphviz)")
        return 1
    return 0
