"""The order in which units are removed: a key for every unit, so that a plan is a prefix of one sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from stp_fx.analysis.groups import Group
from stp_fx.errors import InputError

__all__ = ["SCOPES", "UnitOrder", "local_fraction", "order_units"]

SCOPES = ("local", "global", "isomorphic")


@dataclasses.dataclass(frozen=True, eq=False)
class UnitOrder:
    """The units of all groups, flat, group after group, in channel order within each.

    ``unit``: id in the whole graph. ``owner``: position of the group in the sequence of groups. ``rank``: 0 for the unit of
    the group that is removed first; equal scores follow channel order, and held units come last. ``key``: units are removed
    in order of rising key; for scopes "local" and "isomorphic" the key is the ratio at which the unit is removed: a ratio t
    takes exactly the units of keys up to t. ``sizes``: units of each group. ``index``: ``Group.index`` of each group.
    """

    unit: np.ndarray
    owner: np.ndarray
    rank: np.ndarray
    key: np.ndarray
    sizes: np.ndarray
    index: np.ndarray

    def sequence(self, late: np.ndarray | None = None) -> np.ndarray:
        """Positions of the units in the order in which they are removed.

        Equal keys follow ``Group.index``, then rank, so that the order in which groups are given does not count. The units of
        the groups flagged in ``late`` (bool [groups]) come after all others.
        """
        keys = (self.rank, self.index[self.owner], self.key)
        return np.lexsort(keys if late is None else (*keys, late[self.owner]))


def local_fraction(ratio: float | np.ndarray, exponent: int | np.ndarray) -> float | np.ndarray:
    """The fraction of each of ``exponent`` factors to remove so that ``ratio`` of their product is removed.

    >>> round(float(local_fraction(0.75, 2)), 3)
    0.5
    """
    # the power 1/1 would still round
    return np.where(
        np.equal(exponent, 1), ratio, 1.0 - (1.0 - np.asarray(ratio, dtype=np.float64)) ** (1.0 / np.asarray(exponent))
    )


def order_units(
    groups: Sequence[Group],
    scores: Sequence[torch.Tensor | np.ndarray],
    *,
    scope: str = "local",
    exponents: Mapping[int, int] | None = None,
    classes: Sequence[int] | None = None,
    largest: np.ndarray | None = None,
    held: np.ndarray | None = None,
) -> UnitOrder:
    """Order the units of ``groups`` by ``scores`` (one array of shape [units] a group; the lowest is removed first).

    "local": key 1 - (1 - (rank + 1) / n)^k, with n the group's size and k its exponent (1 if it is in no product):
    all groups shrink at one pace, and products of k shrinking factors at that pace too. "global": the key is the score
    itself; one unit weighs as much as any other, whatever its group, so scores must be comparable across groups.
    "isomorphic": as "local", with rank and n those in the class of the unit's group; ``classes`` gives one number a
    group. Units beyond the ``largest`` number of a group that may be removed come last in their class, so that others take
    their place. The units flagged in ``held`` (bool [units], in the order's own positions) come last in their group.

    Raises :class:`InputError` for an unknown scope, scores of the wrong shape or not finite, and missing ``classes``.
    """
    if scope not in SCOPES:
        raise InputError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")
    flat = _flat_scores(groups, scores)
    sizes = np.array([group.size for group in groups], dtype=np.int64)
    owner = np.repeat(np.arange(len(groups)), sizes)
    unit = np.concatenate([group.units for group in groups]) if groups else np.zeros(0, dtype=np.int64)
    rank = np.empty(len(flat), dtype=np.int64)
    by_rank = np.lexsort((flat, owner) if held is None else (flat, held, owner))
    rank[by_rank] = np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    index = np.array([group.index for group in groups], dtype=np.int64)
    key = flat
    if scope != "global":
        given = exponents or {}
        power = np.array([given.get(group.index, 1) for group in groups], dtype=np.float64)[owner]
        share = (rank + 1) / sizes[owner] if scope == "local" else _shares(flat, owner, index, rank, classes, largest)
        key = np.where(power == 1, share, 1.0 - (1.0 - share) ** power)
    return UnitOrder(unit=unit, owner=owner, rank=rank, key=key, sizes=sizes, index=index)


def _shares(
    flat: np.ndarray,
    owner: np.ndarray,
    index: np.ndarray,
    rank: np.ndarray,
    classes: Sequence[int] | None,
    largest: np.ndarray | None,
) -> np.ndarray:
    """The fraction of its class that is removed once the unit is: float64 [units]."""
    if classes is None:
        raise InputError("scope 'isomorphic' needs the classes of the groups; analysis.isomorphism gives them")
    of_unit = np.asarray(classes, dtype=np.int64)[owner]
    capped = np.zeros(len(flat), dtype=bool) if largest is None else rank >= largest[owner]
    share = np.empty(len(flat))
    for each in np.unique(of_unit):
        members = np.flatnonzero(of_unit == each)
        order = np.lexsort((rank[members], index[owner[members]], flat[members], capped[members]))
        share[members[order]] = np.arange(1, len(members) + 1) / len(members)
    return share


def _flat_scores(groups: Sequence[Group], scores: Sequence[torch.Tensor | np.ndarray]) -> np.ndarray:
    arrays = []
    for group, given in zip(groups, scores, strict=True):
        array = given.detach().cpu().double().numpy() if isinstance(given, torch.Tensor) else np.asarray(given, dtype=np.float64)
        if array.shape != (group.size,):
            raise InputError(f"scores of group {group.name!r} have shape {array.shape}; expected ({group.size},)")
        if not np.isfinite(array).all():
            raise InputError(f"scores of group {group.name!r} are not all finite; criteria.score_groups names the culprit")
        arrays.append(array)
    return np.concatenate(arrays) if arrays else np.zeros(0)
