"""Tables of a report: for terminals, and as markdown."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from stp_fx.report.report import Report
    from stp_fx.terminal import RenderableType, Table

__all__ = ["as_markdown", "as_rich", "as_text", "bytes_text", "plain_table", "seconds_text"]

_TOTALS = ("", "before", "after", "left")
_GROUPS = ("group", "channels", "left", "MACs", "parameters", "compensated")
_NAME = 40
"""Columns of a name that is not broken: half of a terminal of 80."""
_NOTE = (
    "MACs, parameters of a group: saved by it alone, as a share of the whole. Costs that two groups share count in both, so "
    "the columns add up to more than the totals."
)


def as_rich(report: Report) -> RenderableType:
    from stp_fx.terminal import Group, Text

    parts: list[RenderableType] = [plain_table(_TOTALS, _totals(report))]
    if report.groups:
        parts += ["", plain_table(_GROUPS, _groups(report), left=(5,)), "", Text(_NOTE, style="dim")]
    else:
        parts += ["", Text("No group has lost units."), ""]
    footnotes = _footnotes(report)
    return Group(*parts, *(Text(line, style="dim") for line in footnotes))


def as_markdown(report: Report) -> str:
    parts = [_markdown(_TOTALS, _totals(report))]
    if report.groups:
        parts += ["", _markdown(_GROUPS, _groups(report), left=(5,)), "", _NOTE]
    return "\n".join([*parts, "", *_footnotes(report)]).rstrip() + "\n"


def as_text(shown: RenderableType, width: int = 120) -> str:
    """A table as plain text, without colour."""
    from stp_fx.terminal import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(shown)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def plain_table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = ()) -> Table:
    """A table without walls; columns flush right but for the first and those in ``left``, which wrap where it is too narrow.
    Names in the first column are not broken, unless they would take half of a terminal."""
    from stp_fx.terminal import Table, box, escape

    rows = list(rows)
    names = max((len(row[0]) for row in rows), default=0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column(heads[0], overflow="fold", no_wrap=names <= _NAME, min_width=min(names, _NAME))
    for number, head in enumerate(heads[1:], 1):
        justify: Literal["left", "right"] = "left" if number in left else "right"
        table.add_column(head, justify=justify, overflow="fold", no_wrap=number not in left)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def bytes_text(number: float) -> str:
    """Bytes in decimal units, as disks and file managers count them."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.2f} GB"


def seconds_text(seconds: float) -> str:
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def _totals(report: Report) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    for label, name in (("MACs", "macs"), ("parameters", "params")):
        old, new = getattr(report.before, name), getattr(report.after, name)
        rows.append((label, f"{old:,}", f"{new:,}", _share(new, old)))
    old, new = report.size
    rows.append(("size on disk", bytes_text(old), bytes_text(new), _share(new, old)))
    if report.latency is not None:
        old, new = report.latency.medians
        rows.append(("latency", seconds_text(old), seconds_text(new), f"{report.latency.left:.1%}"))
    units = sum(g.before for g in report.groups), sum(g.after for g in report.groups)
    if report.groups:
        rows.append(("channels of the groups below", f"{units[0]:,}", f"{units[1]:,}", _share(units[1], units[0])))
    return rows


def _groups(report: Report) -> list[tuple[str, ...]]:
    macs, params = report.before.macs, report.before.params
    return [
        (
            g.name,
            f"{g.after}/{g.before}",
            f"{g.left:.0%}",
            _saved(g.macs, macs),
            _saved(g.params, params),
            _mark(g.compensation),
        )
        for g in report.groups
    ]


def _saved(part: int, whole: int) -> str:
    return f"-{part / whole:.1%}" if whole else "-"


def _mark(compensation: str | None) -> str:
    return "not recorded" if compensation is None else compensation.replace("_", " ")


def _footnotes(report: Report) -> list[str]:
    lines = ["Size on disk: of the state dict, as safetensors writes it."]
    if report.blocks:
        lines.insert(0, f"Without the blocks {', '.join(report.blocks)}.")
    if report.latency is not None:
        each = report.latency
        threads = f"{each.threads} thread{'' if each.threads == 1 else 's'}"
        inputs = ", ".join(each.inputs)
        lines.append(
            f"Latency: input {inputs}, {threads} of {each.device}; median of {len(each.before)} rounds, both graphs in turn; "
            f"left: the median of the rounds' ratios ({1 / each.left:.2f} times as fast)."
        )
    return lines


def _share(new: float, old: float) -> str:
    return f"{new / old:.1%}" if old else "-"


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = ()) -> str:
    lines = [heads, ["---" if k in (0, *left) else "---:" for k in range(len(heads))], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
