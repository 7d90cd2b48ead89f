"""``stp-fx prune``: prune a model and write the result."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any, get_args

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from stp_fx.api import compare, plan_of, prune_graph, report_of
from stp_fx.cli.arguments import (
    VALIDATE,
    add_command,
    add_data,
    add_selection,
    captured,
    data_of,
    loss_of,
    needs_data,
    selection_of,
)
from stp_fx.cli.files import CheckFailed, write_plan
from stp_fx.cli.output import Output, checked_output
from stp_fx.errors import InputError
from stp_fx.io import save
from stp_fx.ir import provenance_of
from stp_fx.measure.calibration import eval_twin
from stp_fx.measure.latency import example_values
from stp_fx.passes import Pipeline, RemoveChannels
from stp_fx.passes.compensations import CompensationName

__all__ = ["add"]

_SUFFIXES = (".stp", ".safetensors", ".json")


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "prune",
        run,
        "remove channels, write the smaller model",
        """
        Removes the least important channels of a model, writes the result, and
        reports on standard output. The model is run once before and once after:
        nothing is written unless its outputs keep their shapes.
        """,
        """
        stp-fx prune resnet50 --ratio 0.5 --dry-run        report, write nothing
        stp-fx prune resnet50 -w resnet50.pth --target macs -r 0.5 -o half.stp
        stp-fx prune resnet50 -w resnet50.pth --from half.stp -o quarter.stp
        stp-fx prune vit_b_16 -w vit.safetensors --products outer -o heads.stp
        stp-fx prune net.py:make -i 1,1,28,28 --ratios body=0.7 --ignore head \\
            -o small.stp
        stp-fx prune net.py:make --calibration net.py:batches -c variance \\
            --compensation least_squares -o small.stp

      in Python:
        pruned = stp_fx.load("half.stp", model)
        """,
    )
    group = parser.add_argument_group("removal")
    add_selection(parser, group)
    group.add_argument(
        "--compensation", choices=get_args(CompensationName),
        help="the kept channels make up for the removed ones; reads --calibration",
    )  # fmt: skip
    group.add_argument(
        "--recalibrate", type=int, metavar="N",
        help="measure BatchNorm's statistics again on N batches of --calibration, after the removal",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="for random criteria (default: 0)")
    group.add_argument(
        "--pipeline", metavar="TEXT",
        help="the passes to run in place of the options above, as Python prints them: "
        "\"ScoreUnits('magnitude'), SelectUnits(0.5), RemoveChannels()\"",
    )  # fmt: skip
    add_data(parser, "--calibration", "batches for criteria, compensation and allocation that read data")
    files = parser.add_argument_group("output files")
    files.add_argument(
        "--output", "-o", metavar="FILE",
        help=".stp or .safetensors: plan and weights, for stp_fx.load and any other program that reads safetensors; "
        ".json: the plan alone, for stp_fx.apply_plan",
    )  # fmt: skip
    files.add_argument("--force", action="store_true", help="overwrite FILE if it exists; without it that is an error")
    files.add_argument("--dry-run", "-n", action="store_true", help="do all of it but write nothing")


def run(args: argparse.Namespace, output: Output) -> int:
    target = _target(args)
    data, loss = data_of(args, "--calibration"), loss_of(args)
    needs_data(args, data, "--calibration")
    loaded, gm, inputs = captured(args, output)
    if loaded.random and not args.weights:
        output.note(f"note: the weights of {args.model} are random; --weights FILE loads trained ones")
    options = selection_of(args) | {name: getattr(args, name) for name in ("compensation", "recalibrate", "seed")}
    validate = VALIDATE[args.validate]
    if args.pipeline is not None:
        pipeline, options = _pipeline(args, data, loss), {"pipeline": args.pipeline}
        pruned = pipeline(gm).graph_module
    elif data is None:
        with output.stage("pruning"):
            pruned = prune_graph(gm, **options, validate=validate)
    else:
        pruned = prune_graph(gm, **options, validate=validate, calibration=data, loss=loss)  # shows its own progress
    with output.stage("checking and comparing"):
        _check_outputs(gm, pruned)
        report = compare(gm, pruned)
    if target is not None:
        with output.stage(f"writing {target}"):
            write_plan(pruned, target) if target.suffix == ".json" else save(pruned, target)
    asked = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    request = {"command": "prune", "model": args.model, "inputs": [str(each) for each in inputs], "asked": asked}
    request |= {"output": None if target is None else str(target), "dry_run": args.dry_run, "plan": plan_of(pruned).digest()}
    checked = provenance_of(pruned).validation
    selected = report_of(pruned)
    notes = () if selected is None else selected.notes
    request |= {"validation": None if checked is None else checked.to_dict(), "notes": list(notes)}
    output.result({**request, **report.to_dict()}, report)
    for note in notes:
        output.note(note)
    output.note("unchecked: --validate no" if checked is None else checked.line())
    output.note("dry run: nothing was written" if target is None else f"wrote {target}")
    return 0


def _pipeline(args: argparse.Namespace, data: Any, loss: Any) -> Pipeline:
    """The passes of ``--pipeline``, with the data of ``--calibration``.

    Raises:
        InputError: text that is no pipeline, or an option that the text decides.
    """
    plain = argparse.ArgumentParser()
    add_selection(plain)
    given = [name for name, value in vars(plain.parse_args([])).items() if getattr(args, name) != value]
    given += [name for name in ("compensation", "recalibrate") if getattr(args, name) is not None]
    if given:
        raise InputError(f"--pipeline lists the passes to run, so --{given[0].replace('_', '-')} cannot be given beside it")
    named = {name: value for name, value in (("calibration", data), ("loss", loss)) if value is not None}
    if args.validate != "auto" and RemoveChannels.__name__ in args.pipeline:
        named["validate"] = VALIDATE[args.validate]
    return Pipeline.parse(args.pipeline, **named)


def _target(args: argparse.Namespace) -> pathlib.Path | None:
    if args.output is None and not args.dry_run:
        raise InputError("prune writes a file: give --output FILE, or --dry-run to see the report alone")
    if args.output is None:
        return None
    target = checked_output(args.output, _SUFFIXES, overwrite=args.force or args.dry_run)
    return None if args.dry_run else target


def _check_outputs(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    """Runs both on one input of random numbers.

    Raises:
        CheckFailed: outputs of other shapes, or that are not finite where they were.
    """
    example = example_values(gm)
    with torch.no_grad():
        before, after = (tree_flatten(eval_twin(graph)(*example))[0] for graph in (gm, pruned))
    shapes = [[tuple(v.shape) for v in values if isinstance(v, torch.Tensor)] for values in (before, after)]
    if shapes[0] != shapes[1]:
        raise CheckFailed(f"the pruned model gives outputs of {shapes[1]}, the original of {shapes[0]}; nothing was written")
    if _finite(before) and not _finite(after):
        raise CheckFailed("the pruned model gives NaN or infinite outputs where the original does not; nothing was written")


def _finite(values: list[Any]) -> bool:
    return all(bool(torch.isfinite(v).all()) for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
