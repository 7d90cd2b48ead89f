"""``stp-fx sweep``: the plans of several ratios, and the loss with each group masked."""

from __future__ import annotations

import argparse
from typing import Any

from stp_fx.api import sensitivity, sweep
from stp_fx.cli.arguments import add_command, add_data, add_selection, captured, data_of, loss_of, needs_data, selection_of
from stp_fx.cli.inputs import ratio_list
from stp_fx.cli.output import Output, checked_output
from stp_fx.errors import InputError

__all__ = ["add"]

_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_SENSITIVITY_RATIOS = (0.25, 0.5, 0.75)


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "sweep",
        run,
        "a table of many ratios, or of how much each group matters",
        """
        Plans many ratios and reports what each would keep; nothing is removed.
        With --allocation optimal, the table is the Pareto front of costs and
        measured damages.
        With --sensitivity: masks each group alone, at each ratio, and measures
        the loss on --data.
        """,
        """
        stp-fx sweep resnet50 --weights resnet50.pth
        stp-fx sweep resnet50 --at 0.3,0.5,0.7 --scope global --target macs
        stp-fx sweep net.py:make --allocation optimal --target macs \\
            --data net.py:batches
        stp-fx sweep net.py:make --sensitivity --data net.py:batches \\
            --batches 8 --plot sensitivity.png
        """,
    )
    group = parser.add_argument_group("ratios and data")
    group.add_argument(
        "--at", type=ratio_list, metavar="R,R,...", help="the ratios (default: 0.1 to 0.9; with --sensitivity: 0.25,0.5,0.75)"
    )
    group.add_argument("--sensitivity", "-s", action="store_true", help="the loss with one group masked alone")
    group.add_argument("--plot", metavar="FILE", help="with --sensitivity: curves as .png, .svg or .pdf (needs matplotlib)")
    add_selection(parser, without=("ratio", "ratios"))
    add_data(parser, "--data", "batches for --sensitivity, --allocation optimal, and criteria that read data")


def run(args: argparse.Namespace, output: Output) -> int:
    if args.plot is not None:
        if not args.sensitivity:
            raise InputError("--plot draws the results of --sensitivity: give both")
        checked_output(args.plot, (".png", ".svg", ".pdf"), overwrite=True)
    data, loss = data_of(args, "--data"), loss_of(args)
    if args.sensitivity and data is None:
        raise InputError("--sensitivity measures a loss: give --data MODULE:NAME, batches of (input, target)")
    needs_data(args, data, "--data")
    loaded, gm, inputs = captured(args, output)
    if loaded.random and not args.weights:
        output.note(f"note: the weights of {args.model} are random; --weights FILE loads trained ones")
    request = {"command": "sweep", "model": args.model, "inputs": [str(each) for each in inputs]}
    if args.sensitivity:
        chosen = {"ratios": args.at or _SENSITIVITY_RATIOS, "criterion": args.criterion, "ignore": tuple(args.ignore)}
        found = sensitivity(gm, data or (), loss, **chosen)
        if args.plot is not None:
            found.plot(args.plot)
            output.note(f"wrote {args.plot}")
        output.result({**request, **found.to_dict()}, found)
        return 0
    options = selection_of(args)
    if data is None:
        with output.stage("planning"):
            swept = sweep(gm, args.at or _RATIOS, **options)
    else:
        swept = sweep(gm, args.at or _RATIOS, **options, calibration=data, loss=loss)
    output.result({**request, **swept.to_dict()}, swept)
    return 0
