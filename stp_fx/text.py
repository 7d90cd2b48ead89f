"""Short text about long things: lists cut to a line, tables cut to a screen, names close to a mistyped one."""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["ROWS", "clipped", "did_you_mean", "html_table", "listed", "runs"]

ROWS = 16
"""Rows of an HTML table; with its caption, heads and footer it fits a screen."""


def clipped(text: str, width: int = 90) -> str:
    """``text``, cut in the middle if it is longer than ``width``.

    >>> clipped("features.denseblock1.denselayer1.conv1.weight", 20)
    'features....1.weight'
    """
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    return f"{text[: width - 3 - tail]}...{text[-tail:]}"


def listed(items: Iterable[object], limit: int = 3) -> str:
    """The first few items, and how many more there are.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = [str(item) for item in items]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def runs(indices: Sequence[int] | np.ndarray, limit: int = 6) -> str:
    """Ascending indices, with runs of three or more as first and last.

    >>> runs([0, 1, 2, 3, 8, 12, 13])
    '0..3, 8, 12, 13'
    """
    array = np.asarray(indices, dtype=np.int64)
    parts: list[str] = []
    for run in np.split(array, np.flatnonzero(np.diff(array) != 1) + 1):
        parts += [f"{run[0]}..{run[-1]}"] if len(run) > 2 else [str(index) for index in run]
    return ", ".join(parts[:limit]) + (", ..." if len(parts) > limit else "")


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of an error about an unknown name: ``"; did you mean 'conv1'?"``, or ``otherwise`` if nothing is close.

    >>> did_you_mean("conv", ["conv1", "fc"])
    "; did you mean 'conv1'?"
    """
    close = difflib.get_close_matches(name, sorted(known), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else otherwise


def html_table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]], total: int | None = None) -> str:
    """A plain HTML table for notebooks: every text escaped, nothing loaded from elsewhere, no longer than a screen.

    ``total`` is the number of rows, where ``rows`` are only the first of them.
    """
    rows = list(rows)
    total = len(rows) if total is None else total
    lines = [f"<table><caption>{html.escape(caption)}</caption>", _row("th", heads)]
    lines += [_row("td", row) for row in rows[:ROWS]]
    if total > ROWS:
        lines.append(f'<tr><td colspan="{len(heads)}">and {total - ROWS:,} more</td></tr>')
    return "\n".join([*lines, "</table>"])


def _row(tag: str, cells: Iterable[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
