"""From a plan to the units that it removes: the plan's indices, checked against the coupling that the analysis found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from stp_fx.analysis.pins import pin_reasons
from stp_fx.analysis.solved import Solved, alive_classes, kept_axes
from stp_fx.errors import PlanError
from stp_fx.ir.provenance import is_mask_buffer

__all__ = ["Cut", "alive_under", "flag_whole_factors", "removed_units"]


class Cut(Protocol):
    """The contents of a plan: ``kept[name, dim]`` are the kept positions, ``sizes[name, dim]`` the length of the axis."""

    @property
    def kept(self) -> Mapping[tuple[str, int], np.ndarray]: ...

    @property
    def sizes(self) -> Mapping[tuple[str, int], int]: ...


def alive_under(solved: Solved, plan: Cut, *, partial: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Which units are kept under ``plan`` (bool, one per unit), and which classes survive (bool, one per class).

    ``partial`` accepts a plan without an entry for every coupled axis (a masked graph has gained mask buffers since).

    Raises:
        PlanError: unknown tensor, wrong size, a pinned position, or coupled axes that disagree; names the axis.
    """
    removed = removed_units(solved, plan)
    alive = alive_classes(solved, removed)
    found = kept_axes(solved, alive)
    for key, kept in plan.kept.items():
        actual = found.get(_first(solved, key))
        if actual is None or not np.array_equal(actual, kept):
            raise PlanError(_disagreement(key, kept, actual))
    if not partial:
        given = {_first(solved, key) for key in plan.kept}
        missing = [key for key in found if key not in given]
        if missing:
            raise PlanError(
                f"incomplete plan: no entry for {_named(missing[0])}, which these channels also shorten. "
                "ChannelGraph.plan_for gives a plan with every axis"
            )
    return ~removed, alive


def removed_units(solved: Solved, plan: Cut) -> np.ndarray:
    """The units that ``plan`` removes (bool, one per unit): those of which every position is removed."""
    solution = solved.solution
    dead = np.zeros(solution.count, dtype=bool)
    living = np.zeros(solution.count, dtype=bool)
    for key, kept in plan.kept.items():
        classes = solved.classes_of.get(_first(solved, key))
        if classes is None:
            raise PlanError(f"the plan shortens {_named(key)}, but the graph has no such axis")
        if len(classes) != plan.sizes[key]:
            raise PlanError(f"{_named(key)} has {len(classes)} positions; the plan is for an axis of {plan.sizes[key]}")
        gone = np.ones(len(classes), dtype=bool)
        gone[kept] = False
        dead[classes[gone]] = True
        living[classes[~gone]] = True
        pinned = solution.pinned[classes] & gone
        if pinned.any():
            at = int(np.flatnonzero(pinned)[0])
            reasons = "; ".join(pin_reasons(solved, classes[[at]]))
            raise PlanError(f"the plan removes pinned position {at} of {_named(key)}; it is pinned: {reasons}")
    if (dead & living & ~solution.derived).any():
        raise PlanError(_first_conflict(solved, plan, dead & living))
    given = {_first(solved, key) for key in plan.kept}
    seen = np.zeros(solution.count, dtype=bool)
    for key, classes in solved.classes_of.items():
        seen[classes] = True
        if key not in given and not is_mask_buffer(key[0]):
            living[classes] = True
    flag_whole_factors(solved, dead, seen, living & ~dead)
    return dead[solved.unit_class]


def flag_whole_factors(solved: Solved, dead: np.ndarray, seen: np.ndarray, living: np.ndarray) -> None:
    """Extends ``dead`` in place to every factor of a product of which all ``seen`` positions are removed.

    ``seen`` flags the classes of which it is known whether they are removed; it is extended too. The ``living`` are known to be
    kept, and so are the factors of a kept position. If a slice took four of 2 x 4 positions, all that it took of a row may be
    removed while the row is kept.
    """
    living = living.copy()
    for product in reversed(solved.solution.products):
        alive = living[product.classes]
        for k, factor in enumerate(product.factors):
            living[factor[alive.any(axis=tuple(j for j in range(alive.ndim) if j != k))]] = True
    for product in reversed(solved.solution.products):
        told, gone = seen[product.classes], dead[product.classes]
        for k, factor in enumerate(product.factors):
            others = tuple(j for j in range(gone.ndim) if j != k)
            whole = (gone | ~told).all(axis=others) & told.any(axis=others)
            dead[factor[whole & ~living[factor]]] = True
            seen[factor[told.any(axis=others)]] = True


def _first(solved: Solved, key: tuple[str, int]) -> tuple[str, int]:
    return solved.first_name(key[0]), key[1]


def _named(key: tuple[str, int]) -> str:
    return f"'{key[0]}' dim {key[1]}"


def _first_conflict(solved: Solved, plan: Cut, both: np.ndarray) -> str:
    touching = [key for key in plan.kept if both[solved.label[solved.elements_of[_first(solved, key)]]].any()]
    names = " and ".join(map(_named, touching[:2]))
    return f"coupled axes disagree: {names} must keep the same units, and the plan keeps different ones"


def _disagreement(key: tuple[str, int], kept: np.ndarray, actual: np.ndarray | None) -> str:
    size = "all" if actual is None else str(len(actual))
    return (
        f"{_named(key)}: the plan keeps {len(kept)} positions here, but its entries for the coupled axes keep {size}; "
        "coupled axes must lose the same units (see ChannelGraph.explain)"
    )
