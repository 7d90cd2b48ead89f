"""``stp-fx analyze``: the groups of channels that are removed together, and the pinned axes with their reasons."""

from __future__ import annotations

import argparse
from typing import Any

from stp_fx.analysis.cost import parameter_names
from stp_fx.analysis.groups import Group
from stp_fx.analysis.unit_costs import contraction_macs, group_costs, parameter_elements
from stp_fx.api import ChannelGraph, analyze, cost
from stp_fx.cli.arguments import add_command, captured
from stp_fx.cli.output import Output
from stp_fx.report.tables import plain_table
from stp_fx.terminal import Text

__all__ = ["add"]

_ROOM = 20
"""Letters of names that a narrow terminal has room for beside the numbers."""
_HEADS = ("group", "channels", "MACs each", "params each", "with the outputs of")


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "analyze",
        run,
        "groups of channels, their costs, pinned axes and the reasons",
        """
        Shows which channels of a model are removed together, the cost of one
        channel of each group, and the dimensions that cannot be cut, with the
        reasons. Only shapes are run; weights do not matter.
        """,
        """
        stp-fx analyze resnet50
        stp-fx analyze net.py:make -a width=64 --input 1,1,28,28
        stp-fx analyze resnet50 --json | jq '.groups[].name'

        stp-fx analyze resnet50 --explain layer1.0.conv1            a layer
        stp-fx analyze resnet50 --explain layer1.0.conv1.weight:0   its outputs
        stp-fx analyze resnet50 --explain layer1.0.conv1 --index 3  one channel
        stp-fx analyze resnet50 --explain "graph output"            a reason
        """,
    )
    group = parser.add_argument_group("explanations")
    group.add_argument(
        "--explain", "-e", action="append", default=[], metavar="NAME",
        help="in words, instead of the table: an axis (conv1.weight:0), tensor, module, group, node of the graph, or a reason "
        "for pinning; may be repeated",
    )  # fmt: skip
    group.add_argument("--index", type=int, metavar="N", help="with --explain: one position along the axis")


def run(args: argparse.Namespace, output: Output) -> int:
    _, gm, inputs = captured(args, output)
    with output.stage("analysing"):
        graph = analyze(gm)
        total = cost(gm)
    request = {"command": "analyze", "model": args.model, "inputs": [str(each) for each in inputs]}
    if args.explain:
        answers = {name: graph.explain(name, args.index) for name in args.explain}
        output.result({**request, "explained": answers}, Text("\n\n".join(answers.values())))
        return 0
    macs = group_costs(graph, contraction_macs(graph), "unit")
    params = group_costs(graph, parameter_elements(graph, parameter_names(gm)), "unit")
    groups = [_as_data(group, int(macs[group.index]), int(params[group.index])) for group in graph.groups]
    data = {
        **request,
        "macs": total.macs,
        "params": total.params,
        "units": graph.units,
        "groups": groups,
        "pinned": {reason: list(axes) for reason, axes in graph.pinned.items()},
        "unknown_ops": {op: list(nodes) for op, nodes in graph.unknown.items()},
    }
    output.result(data, *_shown(graph, data, output.narrow))
    return 0


def _as_data(group: Group, macs: int, params: int) -> dict[str, Any]:
    return {
        "name": group.name,
        "units": group.size,
        "macs_per_unit": macs,
        "params_per_unit": params,
        "exact": group.exact,
        "notes": list(group.notes),
        "axes": [member.axis.name for member in group.members],
    }


def _shown(graph: ChannelGraph, data: dict[str, Any], narrow: bool) -> list[Any]:
    head = (
        f"{data['model']}, input {' and '.join(data['inputs'])}: {data['macs']:,} MACs, {data['params']:,} parameters, "
        f"{graph.units:,} channels in {len(graph.groups)} groups"
    )
    rows = [
        (
            group.name + ("" if group.exact else " *"),
            f"{group.size:,}",
            f"{each['macs_per_unit']:,}",
            f"{each['params_per_unit']:,}",
            _producers(group, narrow),
        )
        for group, each in zip(graph.groups, data["groups"], strict=True)
    ]
    shown: list[Any] = [Text(head, style="bold"), "", plain_table(_HEADS, rows, left=(4,)), ""]
    if any(not group.exact for group in graph.groups):
        notes = dict.fromkeys(note for group in graph.groups for note in group.notes)
        shown += [Text(f"* masking is not removing: {_few(tuple(notes), 1)}"), ""]
    pinned = [(reason, str(len(axes)), _few(axes)) for reason, axes in graph.pinned.items()]
    shown.append(plain_table(("pinned because of", "axes", "for instance"), pinned, left=(2,)))
    for op, nodes in graph.unknown.items():
        shown.append(Text(f"no rule for {op}, at {_few(nodes)}: the axes that it touches are pinned", style="yellow"))
    return shown


def _producers(group: Group, narrow: bool) -> str:
    """Layers that lose outputs with the one that the group is named for."""
    weights = [m.axis for m in group.members if m.axis.role == "weight" and m.axis.side in ("out", "both")]
    others = [axis.tensor.removesuffix(".weight") for axis in weights if not group.name.startswith(axis.tensor + ":")]
    names = tuple(dict.fromkeys(others))
    if narrow and len("".join(names)) > _ROOM:
        return f"{len(names)} layer{'s' if len(names) > 1 else ''}"
    return _few(names, 3)


def _few(names: Any, number: int = 2) -> str:
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(list(names)[:number]) + more
