"""Units and groups: the plain data that criteria score and selections cut. No behaviour hides here."""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["Axis", "Group", "Member", "Product"]


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One axis as a group touches it: position ``index[k]`` along the axis belongs to unit ``unit[k]`` of the group.

    ``index`` and ``unit`` are int64 arrays of one length, sorted by ``index``. A unit may hold several positions of an axis
    (a flattened map, a head), and an axis may be shared with other groups.
    """

    axis: Axis
    index: np.ndarray
    unit: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units that touch the same axes in the same way; scored and compared together.

    ``units`` are the ids of its units in the whole graph (int64, one per unit), in channel order. ``exact`` says that
    masking and removing give equal numbers; if not, ``notes`` says which op normalises or reduces over the group.
    """

    index: int
    name: str
    units: np.ndarray
    members: tuple[Member, ...]
    exact: bool = True
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.units)


@dataclasses.dataclass(frozen=True)
class Product:
    """An axis split into factors (outer to inner): an index survives if and only if all its factors survive.

    ``factors[k]`` holds the indices of the groups that the k-th factor's units belong to; empty for a pinned factor.
    ``sizes[k]`` is the factor's length, ``axis`` the name of the axis or graph node that was split.
    """

    axis: str
    sizes: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]
