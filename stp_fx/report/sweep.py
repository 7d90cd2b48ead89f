"""Many plans from one collection, and how much each group's loss of units hurts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from typing_extensions import Unpack

from stp_fx.analysis.build import analyze
from stp_fx.analysis.names import entries_of, prunable_groups
from stp_fx.checks import check_callable, is_a, listed_argument
from stp_fx.criteria import Criterion, needs_of, resolve, score
from stp_fx.criteria.auto import check_auto, settled
from stp_fx.errors import InputError
from stp_fx.measure.calibration import batches, eval_twin, watched
from stp_fx.measure.gradients import Loss, call_loss, cross_entropy
from stp_fx.measure.measured import measure
from stp_fx.progress import Progress, steps
from stp_fx.report.run_report import RunReport, run_report
from stp_fx.report.tables import as_text, plain_table
from stp_fx.rewrite.compensation import LeastSquares
from stp_fx.rewrite.removal import mask
from stp_fx.selection import PrunePlan
from stp_fx.selection.choice import check_names, choose, latency_cost, select
from stp_fx.selection.damage import NEEDS, measure_damages
from stp_fx.selection.selection import Selection, SharedOptions, takes_selection
from stp_fx.text import ROWS, html_table, listed
from stp_fx.views import chart

if TYPE_CHECKING:
    from stp_fx.terminal import RenderableType

__all__ = ["Sensitivity", "Sweep", "SweepEntry", "sensitivity", "sweep"]


_NAMED = 12
"""Groups with a colour of their own, or one with dashes, and a line in the legend of a plot."""
_HEADS = ("ratio", "channels", "MACs", "left", "parameters", "left")


@dataclasses.dataclass(frozen=True, eq=False)
class SweepEntry:
    """One ratio: its plan, and the report of the plan; nothing has been removed. ``damage``: what ``allocation`` minimised, for
    this plan; None where the scope says how much is removed."""

    ratio: float
    plan: PrunePlan
    report: RunReport
    damage: float | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """Entries in the order of the ratios given; ``str`` gives a table. With an ``allocation``, costs and damages of the entries
    are the Pareto front that it found."""

    entries: tuple[SweepEntry, ...]

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        ratios = listed((f"{entry.ratio:g}" for entry in self.entries), 8)
        return f"Sweep({len(self.entries)} plans for the ratios {ratios})"

    def _repr_html_(self) -> str:
        return html_table(repr(self), self._heads(), self._rows()[:ROWS], len(self.entries))

    def __rich__(self) -> RenderableType:
        return plain_table(self._heads(), self._rows())

    def _heads(self) -> tuple[str, ...]:
        return (*_HEADS, "damage") if any(entry.damage is not None for entry in self.entries) else _HEADS

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for entry in self.entries:
            report = entry.report
            removed, units = sum(g.removed for g in report.groups), sum(g.size for g in report.groups)
            rows.append((
                f"{entry.ratio:g}", f"{units - removed:,}/{units:,}",
                f"{report.macs[1]:,}", f"{report.macs[1] / max(report.macs[0], 1):.1%}",
                f"{report.params[1]:,}", f"{report.params[1] / max(report.params[0], 1):.1%}",
                *(() if entry.damage is None else (f"{entry.damage:.3g}",)),
            ))  # fmt: skip
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Ratios and the reports of their plans, as plain data for JSON."""
        return {"entries": [{"ratio": e.ratio, **_damage(e), **e.report.to_dict()} for e in self.entries]}


def _damage(entry: SweepEntry) -> dict[str, float]:
    return {} if entry.damage is None else {"damage": entry.damage}


@takes_selection("ratio", "ratios")
def sweep(
    gm: fx.GraphModule,
    ratios: Sequence[float],
    criterion: str | Criterion = "magnitude",
    *,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: Progress = None,
    **options: Unpack[SharedOptions],
) -> Sweep:
    """Collects and scores once, then plans every ratio; nothing is removed. :func:`stp_fx.apply_plan` carries a plan out.

    ``progress``: as for :func:`stp_fx.prune_graph`.
    ``options`` are the fields of :class:`stp_fx.Selection` but for ``ratio`` and ``ratios``: scope, target, ignore, round_to, ...

    Raises:
        InputError: no ratios, or an argument that is out of range.
    """
    selections = [Selection(ratio, **options) for ratio in _listed(ratios)]
    chosen = resolve(criterion)
    check_callable("loss", loss, "(graph, batch) -> scalar")
    calibration = watched(calibration, progress)
    check_auto(chosen, loss=loss)
    check_names(gm, selections[0])
    optimal = selections[0].allocation == "optimal"
    if optimal and calibration is None:
        raise InputError("allocation='optimal' measures damages: give `calibration`, an iterable of batches")
    repair = "least_squares" if optimal else None  # with which damages are measured
    chosen = settled(chosen, gm, data=calibration is not None, ignore=selections[0].ignore, compensation=repair)
    measured = measure(gm, (*needs_of(chosen), *(NEEDS if optimal else ())), calibration, loss)
    scores = score(gm, chosen, measured, ignore=selections[0].ignore, seed=seed)
    damages = None
    if optimal and measured.statistics is not None and calibration is not None:
        damages = measure_damages(gm, scores, measured.statistics, calibration, method=LeastSquares())
    cost = latency_cost(gm) if selections[0].target == "latency" else None
    choices = [(each.ratio, choose(gm, scores, each, cost=cost, damages=damages)) for each in selections]
    return Sweep(tuple(SweepEntry(r, choice.plan, run_report(gm, scores, choice), choice.damage) for r, choice in choices))


def _listed(ratios: object) -> list[float]:
    """Raises :class:`InputError` unless there is at least one ratio, each in [0, 1)."""
    found = listed_argument("ratios", ratios, "give a list of fractions in [0, 1)")
    if not found:
        raise InputError("`ratios` is empty: give at least one fraction in [0, 1)")
    return [Selection(ratio).ratio for ratio in found]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sensitivity:
    """``losses[group]``: the mean loss with so much of the group masked, and nothing else, one for each of ``ratios``;
    ``baseline``: with nothing masked. ``str`` gives a table, most sensitive first."""

    ratios: tuple[float, ...]
    baseline: float
    losses: Mapping[str, tuple[float, ...]]

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        ratios = listed((f"{ratio:g}" for ratio in self.ratios), 8)
        return f"Sensitivity({len(self.losses)} groups at the ratios {ratios}; loss {self.baseline:.4g} with none masked)"

    def _repr_html_(self) -> str:
        rows = [(name, *(f"{value:.4f}" for value in values)) for name, values in self._sorted()[:ROWS]]
        return html_table(repr(self), ("group", *(f"{ratio:g}" for ratio in self.ratios)), rows, len(self.losses))

    def _sorted(self) -> list[tuple[str, tuple[float, ...]]]:
        """Most sensitive first."""
        return sorted(self.losses.items(), key=lambda item: -max(item[1]))

    def __rich__(self) -> RenderableType:
        from stp_fx.terminal import Group as RichGroup

        rows = [(name, *(f"{value:.4f}" for value in values)) for name, values in self._sorted()]
        table = plain_table(("group", *(f"{ratio:g}" for ratio in self.ratios)), rows)
        return RichGroup(f"loss with one group masked; {self.baseline:.4f} with none", "", table)

    def to_dict(self) -> dict[str, Any]:
        """The losses as plain data for JSON."""
        losses = {name: list(values) for name, values in self.losses.items()}
        return {"ratios": list(self.ratios), "baseline": self.baseline, "losses": losses}

    def plot(self, path: str | Path) -> Path:
        """One curve a group, the twelve most sensitive ones named; needs matplotlib.

        Raises:
            InputError: matplotlib is not installed, or it does not know the suffix.
        """
        with chart(path, 8, 5) as axes:
            for rank, (name, values) in enumerate(self._sorted()):
                style: dict[str, Any] = {"label": name, "marker": "o", "color": f"C{rank % 10}"}
                if rank >= 10:
                    style |= {"linestyle": "--", "marker": "s"}
                if rank >= _NAMED:
                    others = f"{len(self.losses) - _NAMED} less sensitive groups" if rank == _NAMED else None
                    style = {"color": "0.8", "zorder": 0, "label": others}
                axes.plot((0.0, *self.ratios), (self.baseline, *values), **style)
            axes.set(xlabel="fraction of the group masked", ylabel="loss")
            axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
        return Path(path)


def sensitivity(
    gm: fx.GraphModule,
    data: Iterable[Any],
    loss: Loss | None = None,
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    criterion: str | Criterion = "magnitude",
    ignore: Iterable[Any] = (),
    progress: Progress = None,
) -> Sensitivity:
    """Masks each group alone, at several ratios, and measures the loss on ``data``; the graph is not changed.

    ``loss(gm, batch)`` gives a scalar (default: cross-entropy on ``(input, target)`` batches); criteria that read data
    read the same batches. ``progress``: as for :func:`stp_fx.prune_graph`.

    Raises:
        InputError: no ratios, no data, or a loss that is not a scalar.
    """
    ratios = _listed(ratios)
    check_callable("loss", loss, "(graph, batch) -> scalar")
    function = cross_entropy if loss is None else loss
    held = watched(data, progress, "data")
    chosen = resolve(criterion)
    ignored = entries_of(ignore, "ignore")
    groups = prunable_groups(gm, analyze(gm), ignored)
    chosen = settled(chosen, gm, data=True, ignore=ignored)
    scores = score(gm, chosen, measure(gm, needs_of(chosen), held, loss), ignore=ignored)
    baseline = _mean_loss(gm, held, function)
    losses: dict[str, tuple[float, ...]] = {}
    with steps("measuring groups", len(groups) * len(ratios), progress) as done:
        for group in groups:
            measured: list[float] = []
            for ratio in ratios:
                plan = select(gm, scores, Selection(0.0, ratios={group.name: ratio}, products="none"))
                measured.append(_mean_loss(mask(gm, plan), held, function, show=False))
                done()
            losses[group.name] = tuple(measured)
    return Sensitivity(tuple(ratios), baseline, losses)


def _mean_loss(gm: fx.GraphModule, data: Iterable[Any], loss: Loss, *, show: bool = True) -> float:
    total, number = 0.0, 0
    twin = eval_twin(gm)
    with torch.no_grad():
        for number, batch in enumerate(batches(gm, data, "measuring the loss", show=show), 1):
            value = call_loss(loss, twin, batch, number - 1)
            if not is_a(value, torch.Tensor) or value.numel() != 1:
                raise InputError(f"the loss of batch {number - 1} is no scalar tensor, but {type(value).__name__}")
            total += float(value)
    return total / number
