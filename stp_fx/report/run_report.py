"""The result of a selection, group by group: as data, as a table, and as log lines that are the same for every criterion."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.criteria.scores import Scores
from stp_fx.ir.validation import Validation
from stp_fx.report.tables import as_text, plain_table
from stp_fx.selection.choice import Choice
from stp_fx.text import ROWS, html_table

if TYPE_CHECKING:
    from stp_fx.terminal import RenderableType

__all__ = ["GroupRun", "RunReport", "run_report"]

_log = logging.getLogger("stp_fx.report")


@dataclasses.dataclass(frozen=True)
class GroupRun:
    """One group: how many of its units are removed, the range of its scores, and whether masking it is removing it.

    ``compensation`` is how its consumers were compensated: "mean", "least_squares", both, with "(in part)" where a consumer is
    neither a linear layer nor a convolution; empty if none was.
    """

    name: str
    removed: int
    size: int
    lowest: float
    highest: float
    exact: bool
    compensation: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class RunReport:
    """The removed units of a plan, group by group. ``macs``, ``params``: before and after; ``pinned``: reason to number of axes;
    ``compensation``: "mean", "least_squares", ..., or None; ``notes``: which criterion "auto" chose and why, where constraints
    kept the plan from what was asked;
    ``validation``: what was run to check the result. ``str`` gives a table."""

    groups: tuple[GroupRun, ...]
    macs: tuple[int, int]
    params: tuple[int, int]
    pinned: dict[str, int]
    compensation: str | None = None
    notes: tuple[str, ...] = ()
    validation: Validation | None = None

    @property
    def validated(self) -> str:
        """One line: what was run to check the capture and the removal, what differs, and what could not be run."""
        return "unchecked" if self.validation is None else self.validation.line()

    def line(self, verb: str = "Prune") -> str:
        """One line of totals."""
        removed, units = sum(g.removed for g in self.groups), sum(g.size for g in self.groups)
        return (
            f"{verb} {removed}/{units} channels of {sum(g.removed > 0 for g in self.groups)} groups{self._mark()}: "
            f"MACs {self.macs[0]:,} to {self.macs[1]:,} ({self.macs[1] / max(self.macs[0], 1):.1%}), "
            f"parameters {self.params[0]:,} to {self.params[1]:,} ({self.params[1] / max(self.params[0], 1):.1%})"
        )

    def log(self, verb: str) -> None:
        """One line a group, one of totals; ``verb`` is "Prune" or "Mask"."""
        for group in self.groups:
            _log.info(
                "%s %d/%d channels of %s%s (scores %.3g to %.3g)",
                verb, group.removed, group.size, group.name, self._mark(), group.lowest, group.highest,
            )  # fmt: skip
        _log.info("%s", self.line(verb))

    def _mark(self) -> str:
        return f" [{self.compensation}]" if self.compensation else ""

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        notes = f"; {len(self.notes)} notes" if self.notes else ""
        return f"RunReport({self.line('remove')}{notes})"

    def _repr_html_(self) -> str:
        changed = [g for g in self.groups if g.removed]
        rows = [(g.name, f"{g.removed}/{g.size}", f"{g.lowest:.3g} to {g.highest:.3g}") for g in changed[:ROWS]]
        return html_table(self.line("Remove"), ("group", "removed", "scores"), rows, len(changed))

    def __rich__(self) -> RenderableType:
        from stp_fx.terminal import Group as RichGroup
        from stp_fx.terminal import Text

        rows = [
            (
                g.name,
                f"{g.removed}/{g.size}",
                f"{1 - g.removed / g.size:.0%}",
                f"{g.lowest:.3g} to {g.highest:.3g}",
                "yes" if g.exact else "no",
            )
            for g in self.groups
        ]
        table = plain_table(("group", "removed", "kept", "scores", "masking = removing"), rows)
        lines = [f"{axes} axes pinned: {reason}" for reason, axes in sorted(self.pinned.items(), key=lambda item: -item[1])]
        return RichGroup(table, "", *(Text(line) for line in [*lines, *self.notes, self.line(), self.validated]))

    def to_dict(self) -> dict[str, Any]:
        """Totals before and after and every group, as plain data for JSON."""
        return {
            "channels": {"before": sum(g.size for g in self.groups), "removed": sum(g.removed for g in self.groups)},
            "macs": {"before": self.macs[0], "after": self.macs[1]},
            "params": {"before": self.params[0], "after": self.params[1]},
            "groups": [dataclasses.asdict(group) for group in self.groups],
            "notes": list(self.notes),
            "validation": None if self.validation is None else self.validation.to_dict(),
        }


def run_report(gm: fx.GraphModule, scores: Scores, choice: Choice) -> RunReport:
    """The report of a selection, before it is carried out."""
    graph, removed = analyze(gm), choice.removed
    before, after = graph.survivors().cost, graph.survivors_without(removed).cost
    rows = tuple(
        GroupRun(g.name, int(removed[g.units].sum()), g.size, float(s.min()), float(s.max()), g.exact)
        for g, s in zip(scores.groups, scores.values, strict=True)
    )
    pinned = {reason: len(axes) for reason, axes in graph.pinned.items()}
    return RunReport(rows, (before.macs, after.macs), (before.params, after.params), pinned, notes=(*scores.notes, *choice.notes))
