"""Units and groups: the plain data that criteria score and selections cut. No behaviour hides here."""

from __future__ import annotations

import dataclasses

import numpy as np

from stp_fx.text import ROWS, clipped, html_table, listed, runs

__all__ = ["Axis", "Group", "Member", "Product"]


@dataclasses.dataclass(frozen=True, repr=False)
class Axis:
    """One dimension of a parameter or buffer.

    ``role`` is what the tensor does in the op that reads it: ``"weight"`` (a contraction's weight), ``"scale"`` (a norm's
    or a layer scale's factor), ``"bias"``, ``"buffer"`` (running statistics and other buffers), ``"other"``.
    ``side`` tells a weight's output axis from its input axis: ``"out"``, ``"in"``, ``"both"`` (a depthwise weight's channel,
    in and out at once), ``""`` for all other roles.
    """

    tensor: str
    dim: int
    size: int
    role: str
    side: str = ""

    @property
    def name(self) -> str:
        return f"{self.tensor}:{self.dim}"

    def __repr__(self) -> str:
        return f"Axis({clipped(self.name)!r}, {self.size} positions, {self.role}{' ' * bool(self.side)}{self.side})"

    def _repr_html_(self) -> str:
        row = (self.tensor, self.dim, self.size, self.role, self.side)
        return html_table(self.name, ("tensor", "dim", "positions", "role", "side"), [row])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Member:
    """One axis as a group touches it: position ``index[k]`` along the axis belongs to unit ``unit[k]`` of the group.

    ``index`` and ``unit`` are int64 arrays of one length, sorted by ``index``. A unit may hold several positions of an axis
    (a flattened map, a head), and an axis may be shared with other groups.
    """

    axis: Axis
    index: np.ndarray
    unit: np.ndarray

    def __repr__(self) -> str:
        units = len(np.unique(self.unit))
        return f"Member({clipped(self.axis.name)!r}, {len(self.index)} of {self.axis.size} positions in {units} units)"

    def _repr_html_(self) -> str:
        units = np.unique(self.unit)
        rows = [(unit, runs(self.index[self.unit == unit])) for unit in units[:ROWS].tolist()]
        return html_table(repr(self), ("unit", "positions"), rows, len(units))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Group:
    """Units that touch the same axes in the same way; scored and compared together.

    ``units`` are the ids of its units in the whole graph (int64, one per unit), in channel order. ``exact`` says that
    masking and removing give equal numbers; if not, ``notes`` says which op normalises or reduces over the group.
    ``chosen``: how many of its units a ``topk`` chooses for each token, if they are experts; so many are kept at least, and only
    a ratio of their own removes any. 0 for all other groups.
    """

    index: int
    name: str
    units: np.ndarray
    members: tuple[Member, ...]
    exact: bool = True
    notes: tuple[str, ...] = ()
    chosen: int = 0

    @property
    def size(self) -> int:
        return len(self.units)

    def __repr__(self) -> str:
        note = "" if self.exact else "; masking is not removing"
        return f"Group({self.index}, {clipped(self.name)!r}, {self.size} units on {len(self.members)} axes{note})"

    def _repr_html_(self) -> str:
        rows = [(m.axis.name, f"{m.axis.role} {m.axis.side}", f"{len(m.index)}/{m.axis.size}") for m in self.members]
        return html_table(repr(self), ("axis", "role", "positions"), rows)


@dataclasses.dataclass(frozen=True, repr=False)
class Product:
    """An axis split into factors (outer to inner): an index survives if and only if all its factors survive.

    ``factors[k]`` holds the indices of the groups that the k-th factor's units belong to; empty for a pinned factor.
    ``sizes[k]`` is the factor's length, ``axis`` the name of the axis or graph node that was split.
    """

    axis: str
    sizes: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]

    def __repr__(self) -> str:
        sizes = " x ".join(map(str, self.sizes))
        return f"Product({clipped(self.axis)!r}, {sizes}, groups {' x '.join(_groups(factor) for factor in self.factors)})"

    def _repr_html_(self) -> str:
        rows = [(size, _groups(factor)) for size, factor in zip(self.sizes, self.factors, strict=True)]
        return html_table(f"product at {self.axis}", ("size", "groups"), rows)


def _groups(factor: tuple[int, ...]) -> str:
    return listed(factor) if factor else "pinned"
