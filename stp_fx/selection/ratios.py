"""Ratios given by name, merged into one ratio a group."""

from __future__ import annotations

from collections.abc import Sequence

from stp_fx.analysis.groups import Group
from stp_fx.errors import InputError
from stp_fx.selection.arguments import check_ratio

__all__ = ["merge_ratios"]


def merge_ratios(named: Sequence[tuple[str, float, Sequence[Group]]]) -> dict[int, float]:
    """One ratio by ``Group.index``, from names with their ratios and the groups that each name stands for.

    Raises:
        InputError: a ratio outside [0, 1), or two names that give one group different ratios.

    >>> import numpy as np
    >>> group = Group(3, "conv1.weight:0", np.arange(8), ())
    >>> merge_ratios([("conv1", 0.5, [group])])
    {3: 0.5}
    """
    result: dict[int, float] = {}
    source: dict[int, str] = {}
    for name, ratio, groups in named:
        check_ratio(f"ratio of {name!r} in `ratios`", ratio)
        for group in groups:
            first = source.setdefault(group.index, name)
            if result.setdefault(group.index, float(ratio)) != float(ratio):
                raise InputError(
                    f"`ratios` gives {first!r} the ratio {result[group.index]:g} and {name!r} the ratio {float(ratio):g}, but "
                    f"both are of the group {group.name!r}, whose channels are removed together: give the two names one "
                    "ratio, or leave one of them out"
                )
    return result
