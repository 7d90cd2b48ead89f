"""What a rewrite did, as data and as a table."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console
from rich.table import Table
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.cost import Cost, cost
from stp_fx.errors import InputError
from stp_fx.ir.state import state_of

__all__ = ["GroupChange", "Report", "compare"]


@dataclasses.dataclass(frozen=True)
class GroupChange:
    """One group: how many of its units are left."""

    name: str
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Costs before and after, and every group that lost units. ``str(report)`` is a table."""

    before: Cost
    after: Cost
    groups: tuple[GroupChange, ...]

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=110, force_terminal=False)
        totals = Table(title="cost")
        for column in ("", "before", "after", "left"):
            totals.add_column(column, justify="right" if column else "left")
        for name in ("macs", "params"):
            old, new = getattr(self.before, name), getattr(self.after, name)
            totals.add_row(name, f"{old:,}", f"{new:,}", f"{new / max(old, 1):.1%}")
        groups = Table(title="groups")
        for column in ("group", "channels", "left"):
            groups.add_column(column, justify="left" if column == "group" else "right", overflow="fold")
        for change in self.groups:
            groups.add_row(change.name, f"{change.after}/{change.before}", f"{change.after / change.before:.0%}")
        console.print(totals)
        console.print(groups)
        return out.getvalue().rstrip()


def compare(before: fx.GraphModule, after: fx.GraphModule) -> Report:
    """Compares a graph with what passes made of it.

    Raises:
        InputError: ``after`` does not come from ``before`` (a group's tensor is missing).
    """
    plan = state_of(after).plan if state_of(after).masked is None else state_of(after).masked
    tensors = dict(after.named_parameters(remove_duplicate=False)) | dict(after.named_buffers(remove_duplicate=False))
    changes = []
    for group in analyze(before).groups:
        first = group.members[0]
        if first.axis.tensor not in tensors:
            raise InputError(f"the second graph has no '{first.axis.tensor}', so it does not come from the first")
        kept = None if plan is None else plan.kept.get((first.axis.tensor, first.axis.dim))
        left = set(range(first.axis.size) if kept is None else kept.tolist())
        alive = {int(unit) for index, unit in zip(first.index, first.unit, strict=True) if int(index) in left}
        changes.append(GroupChange(group.name, group.size, len(alive)))
    return Report(cost(before), cost(after), tuple(c for c in changes if c.after != c.before))
