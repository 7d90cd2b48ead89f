"""The texts of a manager about its steps: the log of one that was taken, and their table."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from stp_fx.analysis.cost import Cost
from stp_fx.text import ROWS, html_table

__all__ = ["position_text", "steps_html", "tell_step"]

_log = logging.getLogger("stp_fx.pat")


def position_text(position: Mapping[str, int]) -> str:
    """Where a run is: "epoch 3", "optimizer step 200"."""
    return ", ".join(f"{'optimizer step' if name == 'count' else name} {value}" for name, value in position.items())


def tell_step(number: int, steps: int, position: Mapping[str, int], masked: bool, axes: int, now: Cost, whole: Cost) -> None:
    """Logs a step; ``axes``: how many were masked or shortened."""
    _log.info(
        "step %d of %d, %s: %s %d axes; MACs %s of %s (%.1f%%), parameters %s of %s (%.1f%%)",
        number, steps, position_text(position), "masked" if masked else "shortened", axes,
        f"{now.macs:,}", f"{whole.macs:,}", 100 * now.macs / max(whole.macs, 1),
        f"{now.params:,}", f"{whole.params:,}", 100 * now.params / max(whole.params, 1),
    )  # fmt: skip


def steps_html(title: str, steps: Sequence[int] | None, epochs: Sequence[int], ratios: Sequence[float], taken: int) -> str:
    """A table of all steps: when, how much is removed by then, and whether it has been taken."""
    rows = [
        (number, place, f"{ratio:.1%}", "taken" if number <= taken else "to come")
        for number, (place, ratio) in enumerate(zip(steps or epochs, ratios, strict=True), 1)
    ]
    unit = "epoch" if steps is None else "optimizer step"
    return html_table(title, ("step", unit, "removed", ""), rows[:ROWS], len(rows))
