"""When the steps of a training run are taken (report, section 2.2)."""

from __future__ import annotations

from stp_fx.checks import check_whole, is_whole, shown
from stp_fx.errors import InputError

__all__ = ["optimizer_steps", "step_epochs"]


def step_epochs(steps: int, start: int, end: int | None, rate: int) -> tuple[int, ...]:
    """The epochs of ``steps`` pruning steps, the first at ``start``; ``rate`` epochs apart, or evenly up to ``end``.

    Raises:
        InputError: a number out of range, or fewer epochs than steps.
    """
    return _spread(steps, start, end, rate, ("start_epoch", "end_epoch", "epoch_rate", "epoch"))


def optimizer_steps(steps: int, start: int | None, end: int | None, every: int | None) -> tuple[int, ...] | None:
    """After how many optimizer steps the pruning steps are taken, in the same way; None if nothing is given.

    Raises:
        InputError: as for epochs.
    """
    if start is None and end is None and every is None:
        return None
    first, rate = (0 if start is None else start), (1 if every is None else every)
    return _spread(steps, first, end, rate, ("start_step", "end_step", "every", "optimizer step"))


def _spread(steps: int, start: int, end: int | None, rate: int, names: tuple[str, str, str, str]) -> tuple[int, ...]:
    first, last, apart, unit = names
    for name, value, least in (("steps", steps, 0), (first, start, 0), (apart, rate, 1)):
        check_whole(name, value, least)
    if steps <= 1:
        return (start,)
    if end is None:
        return tuple(start + k * rate for k in range(steps))
    if not is_whole(end) or end < start + steps - 1:
        raise InputError(
            f"`{last}` is {shown(end)}; {steps} steps from {unit} {start} end at {unit} {start + steps - 1} or later"
        )
    return tuple(start + round(k * (end - start) / (steps - 1)) for k in range(steps))
