"""When the steps of a training run are taken (report, section 2.2)."""

from __future__ import annotations

from stp_fx.checks import check_whole, is_whole, shown
from stp_fx.errors import InputError

__all__ = ["step_epochs"]


def step_epochs(steps: int, start: int, end: int | None, rate: int) -> tuple[int, ...]:
    """The epochs of ``steps`` pruning steps, the first at ``start``; ``rate`` epochs apart, or evenly up to ``end``.

    Raises:
        InputError: a number out of range, or fewer epochs than steps.
    """
    for name, value, least in (("steps", steps, 0), ("start_epoch", start, 0), ("epoch_rate", rate, 1)):
        check_whole(name, value, least)
    if steps <= 1:
        return (start,)
    if end is None:
        return tuple(start + k * rate for k in range(steps))
    if not is_whole(end) or end < start + steps - 1:
        raise InputError(
            f"`end_epoch` is {shown(end)}; {steps} steps from epoch {start} end at epoch {start + steps - 1} or later"
        )
    return tuple(start + round(k * (end - start) / (steps - 1)) for k in range(steps))
