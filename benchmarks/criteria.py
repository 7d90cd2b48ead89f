"""How long each criterion takes to score, and how that grows with the width; the data it reads is there already.

    python benchmarks/criteria.py [--widths 256,512,1024,2048,4096] [--out benchmarks/results/criteria]

Two networks: "wide" has one hidden layer of n units between 64 inputs and 64 outputs, so that its weights are linear in n;
"square" has two hidden layers of n units, so that one weight is n x n. A norm follows each hidden layer. One thread; medians;
every round scores all groups in a fresh context, so that nothing is kept from the round before. The exponent is the slope of
log time over log n for the three largest widths: small ones show the constant, not the growth.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, machine, markdown_machine, markdown_table, median, timed, wide_console, write
from rich.console import Console
from rich.table import Table
from torch import fx

import stp_fx
from stp_fx.criteria import Criterion, Hessian, ScoreContext, Taylor, resolve, score_groups
from stp_fx.measure.gradients import Gradients
from stp_fx.measure.statistics import Statistics, collect_statistics

CRITERIA: dict[str, Criterion] = {
    **{name: resolve(name) for name in ("random", "magnitude", "lamp", "bn_scale", "mac_aware", "variance", "taylor")},
    "taylor, elementwise": Taylor("elementwise"),
    "hessian, fisher": resolve("hessian"),
    "hessian, hutchinson": Hessian("hutchinson"),
    "fpgm": resolve("fpgm"),
    "reconstruction": resolve("reconstruction"),
}
_OBSERVATIONS = 512
_FIXED = 64
FAMILIES = {
    "wide": "one hidden layer of n units, 64 inputs and outputs",
    "square": "two hidden layers of n units, 64 inputs and outputs",
}
NOTE = f"""\
Milliseconds to score all units, one thread, medians. Exponent: slope of log time over log n, for the three largest widths.
Gradients are random numbers and statistics come from {_OBSERVATIONS} observations: what is timed is scoring alone.

In "wide" every unit has as many weights whatever n is, so that time linear in the channels is an exponent of 1. In "square"
there are n^2 weights, and a criterion that reads each once has an exponent of 2. FPGM compares all pairs of units (n^2
distances) and reconstruction factorises n x n covariances (n^3): by definition, and at the speed of matrix products.
"""


def network(family: str, width: int) -> torch.nn.Sequential:
    """Linear layers, each hidden one with a norm (which "bn_scale" reads) and a ReLU; random weights."""
    torch.manual_seed(0)
    sizes = [_FIXED, *[width] * (1 if family == "wide" else 2), _FIXED]
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(before, after), torch.nn.BatchNorm1d(after), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-2]).eval()


def prepared(family: str, width: int) -> tuple[fx.GraphModule, Statistics, Gradients]:
    """A traced network with everything that any criterion reads; gradients are random, as only their size matters."""
    gm = stp_fx.trace(network(family, width), torch.randn(2, _FIXED))
    data = torch.randn(_OBSERVATIONS, _FIXED, generator=torch.Generator().manual_seed(0))
    statistics = collect_statistics(gm, data, covariance=True)
    random = {name: torch.randn_like(p) for name, p in gm.named_parameters()}
    return gm, statistics, Gradients(random, {name: g.square() for name, g in random.items()}, random)


def seconds(gm: fx.GraphModule, statistics: Statistics, gradients: Gradients, criterion: Criterion, budget: float) -> list[float]:
    """Times of at least one round, at most seven, for about ``budget`` seconds; a first short one is not counted."""
    tensors = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    groups, times, start = stp_fx.analyze(gm).groups, [], time.perf_counter()

    def score() -> Any:
        with torch.no_grad():
            return score_groups(groups, criterion, ScoreContext(tensors, 0, gm, statistics, gradients))

    first, _ = timed(score)
    if first > budget / 2:
        return [first]
    while (len(times) < 7 and time.perf_counter() - start < budget) or not times:
        times.append(timed(score)[0])
    return times


def exponent(widths: list[int], times: list[float]) -> float:
    """Slope over the three largest widths."""
    return float(np.polyfit(np.log(widths[-3:]), np.log(times[-3:]), 1)[0])


def rows(widths: list[int], measured: dict[str, list[float]]) -> list[list[str]]:
    return [[name, *(_shown(t * 1e3) for t in times), f"{exponent(widths, times):.2f}"] for name, times in measured.items()]


def _shown(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def measure(family: str, widths: list[int], budget: float, console: Console) -> dict[str, list[float]]:
    """Median seconds of every criterion at every width."""
    measured: dict[str, list[float]] = {name: [] for name in CRITERIA}
    for width in widths:
        gm, statistics, gradients = prepared(family, width)
        for name, criterion in CRITERIA.items():
            measured[name].append(median(seconds(gm, statistics, gradients, criterion, budget)) or 0.0)
        console.print(f"  {family}, n = {width}")
    return measured


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="256,512,1024,2048,4096", help="comma-separated (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for one criterion at one width (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "criteria", help="result files, without suffix")
    return parser.parse_args()


def show(title: str, header: list[str], cells: list[list[str]], console: Console) -> None:
    table = Table(title=title)
    for position, column in enumerate(header):
        table.add_column(column, justify="right" if position else "left")
    for row in cells:
        table.add_row(*row)
    console.print(table)


def main() -> None:
    args, console = arguments(), wide_console()
    torch.set_num_threads(1)
    widths = [int(word) for word in args.widths.split(",")]
    header = ["criterion", *(f"n = {width}" for width in widths), "exponent"]
    text, results = ["# Criteria: time to score", markdown_machine(machine()), NOTE.strip()], {}
    for family, meaning in FAMILIES.items():
        results[family] = measure(family, widths, args.budget, console)
        cells = rows(widths, results[family])
        show(f"{family}: {meaning}, milliseconds", header, cells, console)
        text += [f"## {family}: {meaning}", markdown_table(header, cells)]
    write(args.out, "\n\n".join(text), {"machine": machine(), "widths": widths, "seconds": results})


if __name__ == "__main__":
    main()
