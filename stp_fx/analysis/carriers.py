"""Carriers: the dimensions along which a set of units stands whole, so that a matrix over the units can act on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.errors import NothingToRotateError
from stp_fx.rules import TensorDims

__all__ = ["Carrier", "carriers_of_axes", "carriers_of_value", "touches", "units_of_dim"]


@dataclasses.dataclass(frozen=True, eq=False)
class Carrier:
    """Dimension ``dim`` of a tensor: channel c of block b is at ``positions[b, c]`` (int64 [blocks, channels]).

    A value in which channels stand once has one block; patches laid beside each other, or a flattened map, have several.
    """

    dim: int
    positions: np.ndarray


def units_of_dim(graph: ChannelGraph, value: Any, dim: int) -> np.ndarray | None:
    """The units along a dimension of a value in the order of their first positions; None unless each position is of one unit."""
    if not isinstance(value, TensorDims) or not value.dims:
        return None
    index, unit = graph.units_along(value.dims[dim])
    if not len(index) or len(np.unique(index)) != len(index):
        return None
    _, first = np.unique(unit, return_index=True)
    return unit[np.sort(first)]


def carriers_of_value(graph: ChannelGraph, name: str, value: TensorDims, units: np.ndarray) -> tuple[Carrier, ...]:
    """The dimensions of the value ``name`` that carry ``units``.

    Raises:
        NothingToRotateError: a dimension holds a part of the units only.
    """
    found = []
    for dim, factors in enumerate(value.dims):
        index, unit = graph.units_along(factors)
        carrier = _carrier(name, dim, index, unit, units)
        if carrier is not None:
            found.append(carrier)
    return tuple(found)


def carriers_of_axes(graph: ChannelGraph, units: np.ndarray) -> Mapping[str, tuple[Carrier, ...]]:
    """The parameters and buffers that carry ``units``, tied ones under their first name.

    Scales (of norms and layer scales) are left out: a scale multiplies channel by channel, so no matrix acts on it.

    Raises:
        NothingToRotateError: an axis holds a part of the units only.
    """
    found: dict[str, list[Carrier]] = {}
    for tensor, dim, index, unit in _axes(graph):
        carrier = _carrier(tensor, dim, index, unit, units)
        if carrier is not None:
            found.setdefault(tensor, []).append(carrier)
    return {name: tuple(carriers) for name, carriers in found.items()}


def touches(graph: ChannelGraph, value: Any, units: np.ndarray) -> bool:
    """Whether a value, or one inside a list or dict of values, has a position of one of the units."""
    if isinstance(value, TensorDims):
        return any(np.isin(graph.units_along(dim)[1], units).any() for dim in value.dims)
    if isinstance(value, (list, dict)):
        return any(touches(graph, each, units) for each in (value.values() if isinstance(value, dict) else value))
    return False


def _axes(graph: ChannelGraph) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    solved = graph._solved
    for axis in solved.found.axes:
        if axis.role != "scale":
            index, unit = solved.touched.of(solved.label[axis.ids])
            yield axis.tensor, axis.dim, index, unit


def _carrier(name: str, dim: int, index: np.ndarray, unit: np.ndarray, units: np.ndarray) -> Carrier | None:
    among = np.isin(unit, units)
    if not among.any():
        return None
    index, unit = index[among], unit[among]
    blocks, rest = divmod(len(index), len(units))
    order = np.argsort(unit, kind="stable")
    if rest or not np.array_equal(unit[order], np.repeat(np.sort(units), blocks)):
        raise NothingToRotateError(f"'{name}' holds a part of the channels along dimension {dim}, so they cannot be mixed there")
    by_unit = index[order].reshape(len(units), blocks)
    rank = np.empty(len(units), dtype=np.int64)
    rank[np.argsort(units, kind="stable")] = np.arange(len(units))
    return Carrier(dim, by_unit[rank].T.copy())
