"""The accuracy of ``criterion="auto"`` in the cells that other benchmarks have measured, beside each criterion by itself.

    python benchmarks/auto.py      # reads benchmarks/results, runs no network; writes auto.md and auto.json there

A cell is one network at one target with one scope and repair, in which several criteria were measured on the same data, so that
only the criterion differs. The library says what "auto" is in it. Cells of criteria that read weights alone count as "no data";
in all others every criterion is a candidate, Taylor scores (which read labels) too.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, machine, markdown_machine, markdown_table, write
from torch import nn

import stp_fx
from stp_fx.criteria import Auto

WEIGHTS = ("magnitude", "lamp", "fpgm", "bn_scale")
CRITERIA = ("magnitude", "variance", "reconstruction", "taylor", "lamp", "fpgm", "bn_scale")
NORMS = {"resnet": True, "mobilenet": True, "vit": False, "crepe-tiny": True, "crepe-full": True, "minilm": False}
"""Whether a network has BatchNorm."""
REPAIRS = {"none": None, "mean": "mean", "least squares": "least_squares", "sequential": "sequential"}
TABLES = ("retention-repairs", "retention-criteria", "pretrained-criteria", "allocation", "auto-cells")
ALLOCATION = {"least_squares": "least squares + BN"}
"""In allocation.json BatchNorm is recalibrated."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """``kept``: criterion to score. ``table``: the file it is from; ``scope``, ``repair`` ("least squares + BN")."""

    table: str
    network: str
    target: str
    scope: str
    repair: str
    variant: str
    kept: Mapping[str, float]

    @property
    def data(self) -> bool:
        return not set(self.kept) <= set(WEIGHTS)

    @property
    def recalibrated(self) -> bool:
        return self.repair.endswith(" + BN")

    @property
    def auto(self) -> str:
        return choice(self.data, NORMS[self.network], REPAIRS[self.repair.removesuffix(" + BN")], self.recalibrated)

    @property
    def situation(self) -> str:
        if not self.data:
            return "no data"
        repair = self.repair.removesuffix(" + BN")
        if repair in ("least squares", "sequential"):
            return f"data, {repair}"
        norms = "BatchNorm's old statistics" if NORMS[self.network] and not self.recalibrated else "no BatchNorm, or recalibrated"
        return f"data, {repair}, {norms}"


@functools.cache
def choice(data: bool, norms: bool, compensation: str | None, recalibrated: bool) -> str:
    """The name of what the library chooses for a small network with BatchNorm or without."""
    layers = [nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if norms else []), nn.ReLU(), nn.Linear(8, 2)]
    gm = stp_fx.trace(nn.Sequential(*layers).eval(), torch.zeros(2, 4), validate=False)
    chosen = Auto(compensation, recalibrated).choose(gm, data=data)
    return type(chosen.criterion).__name__.lower()


def cells(results: Path = RESULTS) -> list[Cell]:
    """All cells with at least two criteria."""
    found: dict[tuple[str, ...], dict[str, float]] = collections.defaultdict(dict)
    for table, where, method, score in _measured(results):
        parts = method.split(", ")
        (criterion,) = [each for each in parts if each in CRITERIA] or [""]
        if criterion:
            scope = next(each for each in parts if each in ("local", "global", "isomorphic", "optimal", "layers alone"))
            variant = ", ".join(each for each in parts[:-1] if each not in (criterion, scope))
            network, _, target = where.rpartition(" ")
            found[table, network, target, scope, parts[-1], variant][criterion] = score
    return [Cell(*key, kept) for key, kept in found.items() if len(kept) > 1]


def _measured(results: Path) -> Iterator[tuple[str, str, str, float]]:
    """(table, network and target, method, score); a method is variant, criterion, scope, repair."""
    read = {name: json.loads((results / f"{name}.json").read_text())["results"] for name in TABLES}
    for where, found in read["retention-repairs"].items():
        yield from (("retention-repairs", where, method, each["chosen on"]) for method, each in found["ours"].items())
    for where, found in read["retention-criteria"].items():
        yield from (("retention-criteria", where, method, score) for method, score in found["ours"].items())
    for where, found in read["pretrained-criteria"].items():
        yield from (("pretrained-criteria", where, method, next(iter(each.values()))) for method, each in found["ours"].items())
    for where, found in read["allocation"].items():
        network, criterion, compensation, target = where.split(", ")
        for scope, each in found["methods"].items():
            if scope in ("local", "isomorphic"):  # these cells are among those of retention-criteria.json
                continue
            yield "allocation", f"{network} {target}", f"{criterion}, {scope}, {ALLOCATION[compensation]}", each["accuracy"]
    for where, found in read["auto-cells"].items():
        yield from (("auto-cells", where, method, score) for method, score in found.items())


@dataclasses.dataclass(frozen=True)
class Line:
    """Cells of one situation: the mean of "auto" and of each criterion over those that have it, and how often "auto" is best or
    worst of its cell."""

    cells: int
    auto: float
    means: Mapping[str, float]
    beside: Mapping[str, float]
    best: int
    worst: int


def line(those: Iterable[Cell]) -> Line:
    """``beside[criterion]``: the mean of "auto" over the cells that have the criterion."""
    those = [cell for cell in those if cell.auto in cell.kept]
    names = [name for name in CRITERIA if any(name in cell.kept for cell in those)]
    having = {name: [cell for cell in those if name in cell.kept] for name in names}
    return Line(
        len(those),
        _mean(cell.kept[cell.auto] for cell in those),
        {name: _mean(cell.kept[name] for cell in having[name]) for name in names},
        {name: _mean(cell.kept[cell.auto] for cell in having[name]) for name in names},
        sum(cell.kept[cell.auto] == max(cell.kept.values()) for cell in those),
        sum(cell.kept[cell.auto] == min(cell.kept.values()) < max(cell.kept.values()) for cell in those),
    )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def lines(found: Iterable[Cell], *keys: str) -> dict[tuple[Any, ...], Line]:
    """By these attributes of a cell, in the order of appearance."""
    groups: dict[tuple[Any, ...], list[Cell]] = collections.defaultdict(list)
    for cell in found:
        if cell.auto in cell.kept:
            groups[tuple(getattr(cell, key) for key in keys)].append(cell)
    return {key: line(those) for key, those in sorted(groups.items())}


def report(found: list[Cell]) -> str:
    used = [cell for cell in found if cell.auto in cell.kept]
    names = [name for name in CRITERIA if any(name in cell.kept for cell in used)]

    def table(*keys: str) -> str:
        head = (*keys, "cells", "auto is", "auto", "best in", "worst in", *names)
        return markdown_table(head, [_row(key, each, used, keys, names) for key, each in lines(used, *keys).items()])

    return f"""# What `criterion="auto"` keeps, beside each criterion by itself

{markdown_machine(machine())}

Made of {", ".join(f"`{name}.json`" for name in TABLES)}; no network was run
for it. A cell is a network at a target (MACs removed), with a scope and a repair, measured with several criteria on the same
data: accuracy, or rank agreement. "auto" is the score of the criterion that the library chooses there. Best in, worst in: the
cells in which that criterion is the best, or the worst, of those measured. A criterion's column: its mean over the cells that
have it, and in brackets what "auto" has more over the same ones.

`retention-repairs.json` is the retention table of 2026-11-30 with two criteria, before there were repairs by training.
`retention-criteria.json` is that of 2026-11-24, on test images, with magnitude and Taylor scores too. Taylor scores read labels.
"no data": criteria that read weights alone; the "+ BN" cells among them recalibrate after the removal.

## By situation

{table("situation")}

## By situation and network

{table("situation", "network")}
"""


def _row(key: tuple[Any, ...], each: Line, used: list[Cell], keys: tuple[str, ...], names: list[str]) -> list[str]:
    chosen = dict.fromkeys(cell.auto for cell in used if tuple(getattr(cell, k) for k in keys) == key)
    shown = [f"{each.means[n]:.3f} ({each.beside[n] - each.means[n]:+.3f})" if n in each.means else "-" for n in names]
    return [*key, str(each.cells), ", ".join(chosen), f"{each.auto:.3f}", str(each.best), str(each.worst), *shown]


def main() -> None:
    found = cells()
    listed = [
        {**dataclasses.asdict(cell), "kept": dict(cell.kept), "situation": cell.situation, "auto": cell.auto} for cell in found
    ]
    write(RESULTS / "auto", report(found), {"machine": machine(), "cells": listed})


if __name__ == "__main__":
    main()
