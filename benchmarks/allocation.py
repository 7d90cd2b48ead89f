"""How much of each group is removed: ``allocation="optimal"`` beside the scopes, at equal MACs.

    python benchmarks/allocation.py [--networks resnet,mobilenet,vit] [--criteria reconstruction,variance]
        [--targets 0.3,0.5,0.7] [--compensations least_squares] [--resume] [--out benchmarks/results/allocation]

Networks trained on Fashion-MNIST (``_fashion.py``), pruned one-shot to 70, 50 and 30 % of their MACs. In a cell the criterion,
the compensation and the calibration images are the same, and only the fractions of the groups differ. "layers alone" is the
allocation by the relative losses of the layers, without measuring what they are worth at the network's output
(``MeasureDamage(fractions=())``). Accuracy on the 10,000 test images; BatchNorms recalibrated. Seconds: of the damages, and of
the plan.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, machine, markdown_machine, markdown_table, timed, wide_console, write
from _fashion import Fashion, load
from _opponent import has_batchnorm
from rich.table import Table
from torch import fx, nn

import stp_fx
from stp_fx.passes import (
    Artifacts,
    CollectStatistics,
    MeasureDamage,
    Pipeline,
    RecalibrateBatchNorm,
    RemoveChannels,
    ScoreUnits,
    SelectUnits,
)
from stp_fx.passes.compensations import compensation_named

SCOPES = ("local", "global", "isomorphic")
ALLOCATIONS = {"layers alone": (), "optimal": (0.25, 0.5, 0.75)}
CALIBRATION, PATCHES = 2048, 1152  # images; values of a patch, as in prune_graph
RECALIBRATION = 4  # batches

Cell = dict[str, Any]


def plans(
    gm: fx.GraphModule, scored: Artifacts, batches: Any, target: float, damages: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """By method: the artifacts with its plan, and the seconds that measuring damages and planning took."""
    for scope in SCOPES:
        seconds, selected = timed(functools.partial(SelectUnits(target, scope=scope, target="macs"), gm, scored))
        yield scope, (selected.artifacts, 0.0, seconds)
    for name, fractions in ALLOCATIONS.items():
        if name not in damages:
            damages[name] = timed(functools.partial(MeasureDamage(batches, fractions=fractions), gm, scored))
        measuring, measured = damages[name]
        select = SelectUnits(target, allocation="optimal", target="macs")
        seconds, selected = timed(functools.partial(select, gm, measured.artifacts))
        yield name, (selected.artifacts, measuring, seconds)


def cells(network: str, data: Fashion, arguments: argparse.Namespace, known: dict[str, Cell]) -> Iterator[tuple[str, Cell]]:
    """A result for each criterion, compensation and target that is not known yet."""
    model: nn.Module = load(network)
    batches = data.calibration(CALIBRATION)
    gm = stp_fx.trace(model, data.test_x[:1])
    whole, macs = data.accuracy(model), stp_fx.cost(gm).macs
    collected = CollectStatistics(batches, covariance=True, maps=True, patches=PATCHES)(gm).artifacts
    for criterion in arguments.criteria.split(","):
        scored = ScoreUnits(criterion)(gm, collected).artifacts
        damages: dict[str, Any] = {}
        for target in map(float, arguments.targets.split(",")):
            for compensation in arguments.compensations.split(","):
                name = f"{network}, {criterion}, {compensation}, {target:g}"
                if name in known:
                    continue
                repair = compensation_named(compensation, batches)
                cell: Cell = {"unpruned": whole, "methods": {}}
                for method, (artifacts, measuring, planning) in plans(gm, scored, batches, target, damages):
                    pruned = Pipeline(*repair.passes, RemoveChannels())(gm, artifacts).graph_module
                    if has_batchnorm(pruned) and compensation != "sequential":  # that one leaves nothing to recalibrate
                        pruned = RecalibrateBatchNorm(batches, RECALIBRATION)(pruned).graph_module
                    cell["methods"][method] = {
                        "accuracy": data.accuracy(pruned),
                        "macs": stp_fx.cost(pruned).macs / macs,
                        "measuring": measuring,
                        "planning": planning,
                        "removed": {g.name: f"{g.removed}/{g.size}" for g in artifacts.report.groups},
                    }
                yield name, cell


HEADER = ("network, criterion, compensation, MACs removed", "unpruned", *SCOPES, *ALLOCATIONS, "optimal - best scope", "seconds")


def row(name: str, cell: Cell) -> list[str]:
    found = cell["methods"]
    best = max(found[scope]["accuracy"] for scope in SCOPES)
    optimal = found["optimal"]
    return [
        name,
        f"{cell['unpruned']:.2%}",
        *(f"{found[method]['accuracy']:.2%}" for method in (*SCOPES, *ALLOCATIONS)),
        f"{100 * (optimal['accuracy'] - best):+.2f}",
        f"{optimal['measuring']:.1f} + {optimal['planning']:.1f}",
    ]


def report(out: Path, results: dict[str, Cell], commands: list[str]) -> Table:
    """Written after every cell; gives the table."""
    rows = [row(name, cell) for name, cell in results.items()]
    table = Table(*HEADER, title="accuracy right after pruning, at equal MACs")
    for each in rows:
        table.add_row(*each)
    macs = [found["macs"] for cell in results.values() for found in cell["methods"].values()]
    facts = {**machine(), "command": "; ".join(commands)}
    better = sum(float(each[-2]) >= 0 for each in rows)
    text = f"""# Allocation: how much of each group is removed

{markdown_machine(facts)}

Networks {__doc__.partition("Networks ")[2].strip()}

The optimal allocation is at least as good as the best of the three scopes in {better} of {len(rows)} cells. Seconds on a machine
that did other work as well. MACs left: {min(macs):.3f} to {max(macs):.3f}.

{markdown_table(HEADER, rows)}
"""
    write(out, text, {"machine": facts, "commands": commands, "results": results})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet,mobilenet,vit")
    parser.add_argument("--criteria", default="reconstruction,variance")
    parser.add_argument("--targets", default="0.3,0.5,0.7", help="fractions of the MACs to remove")
    parser.add_argument("--compensations", default="least_squares")
    parser.add_argument("--out", type=Path, default=RESULTS / "allocation")
    parser.add_argument("--resume", action="store_true", help="keep the cells that the result file has")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, console = Fashion(), wide_console()
    kept = arguments.out.with_suffix(".json")
    before: dict[str, Any] = json.loads(kept.read_text()) if arguments.resume and kept.exists() else {}
    results, commands = before.get("results", {}), [*before.get("commands", []), machine()["command"]]
    for network in arguments.networks.split(","):
        for name, cell in cells(network, data, arguments, results):
            results[name] = cell
            report(arguments.out, results, commands)
            console.print("  ".join(row(name, cell)))
    console.print(report(arguments.out, results, commands))


if __name__ == "__main__":
    main()
