"""The result of a rewrite, as data; :mod:`stp_fx.report.tables` gives the tables."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from stp_fx.analysis.cost import Cost
from stp_fx.report.paired import Latency
from stp_fx.report.tables import as_markdown, as_rich, as_text
from stp_fx.text import ROWS, html_table
from stp_fx.views import chart

if TYPE_CHECKING:
    from stp_fx.terminal import RenderableType

__all__ = ["GroupChange", "Report"]


@dataclasses.dataclass(frozen=True)
class GroupChange:
    """One group that lost units.

    ``macs`` and ``params`` are what would be saved if this group alone had lost them: what two groups share, such as a
    convolution between them, is counted in both, so they do not add up to the total. ``compensation`` is how the consumers
    of the group were compensated ("mean", "least_squares", ...), "no", or None where no selection has recorded it.
    """

    name: str
    before: int
    after: int
    macs: int = 0
    params: int = 0
    compensation: str | None = None

    @property
    def left(self) -> float:
        return self.after / self.before


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """Two graphs side by side, and every group that lost units. ``str`` gives a table as plain text, rich prints it in
    colour, :meth:`to_markdown` and :meth:`to_dict` are for documents and programs.

    ``size`` are the bytes of both state dicts as safetensors writes them; ``latency`` is None unless it was measured. ``blocks``
    names those that the second graph is without, or has masked, and the first has.
    """

    before: Cost
    after: Cost
    groups: tuple[GroupChange, ...]
    size: tuple[int, int] = (0, 0)
    latency: Latency | None = None
    blocks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        macs, params = (f"{getattr(self.before, n):,} to {getattr(self.after, n):,}" for n in ("macs", "params"))
        return f"Report({len(self.groups)} groups changed; MACs {macs}, parameters {params})"

    def _repr_html_(self) -> str:
        rows = [(each.name, f"{each.after}/{each.before}", f"{each.left:.0%}") for each in self.groups[:ROWS]]
        return html_table(repr(self), ("group", "channels", "left"), rows, len(self.groups))

    def __rich__(self) -> RenderableType:
        return as_rich(self)

    def to_markdown(self) -> str:
        """Two tables of GitHub's markdown: totals, groups."""
        return as_markdown(self)

    def plot(self, path: str | pathlib.Path) -> pathlib.Path:
        """A bar for every group that lost units: how many it keeps of how many; needs matplotlib, the suffix gives the format.

        Raises:
            InputError: matplotlib is not installed, or it does not know the suffix.
        """
        with chart(path, 7.0, 1.0 + 0.24 * max(len(self.groups), 1)) as axes:
            rows = range(len(self.groups))
            axes.barh(rows, [each.before for each in self.groups], color="#dddddd", label="removed")
            axes.barh(rows, [each.after for each in self.groups], color="#1f4e9c", label="kept")
            axes.set_yticks(rows, [f"{each.name}  {each.after}/{each.before}" for each in self.groups], fontsize=7)
            axes.set(xlabel="units", ylim=(len(self.groups) - 0.4, -0.6))
            axes.legend(fontsize=7, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
        return pathlib.Path(path)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON: counts, bytes, seconds."""
        result: dict[str, Any] = {
            name: _pair(getattr(self.before, name), getattr(self.after, name)) for name in ("macs", "params")
        }
        result["bytes"] = _pair(*self.size)
        if self.latency is not None:
            seconds = self.latency.medians
            result["seconds"] = {"before": seconds[0], "after": seconds[1], "left": self.latency.left}
            result["seconds"] |= {"rounds": len(self.latency.before), "inputs": list(self.latency.inputs)}
            result["seconds"] |= {"threads": self.latency.threads, "device": self.latency.device}
        result["blocks"] = list(self.blocks)
        result["groups"] = [
            {
                "name": each.name,
                "units": _pair(each.before, each.after),
                "saved_alone": {"macs": each.macs, "params": each.params},
                "compensation": each.compensation,
            }
            for each in self.groups
        ]
        return result


def _pair(before: int, after: int) -> dict[str, Any]:
    return {"before": before, "after": after, "left": after / before if before else 1.0}
