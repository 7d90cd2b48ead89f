"""Norms of rows of many parameters at once: a row is a unit with all that is coupled to it, or one position of one axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.groups import Axis, Group
from stp_fx.errors import InputError, NothingToPruneError
from stp_fx.ir.memo import Same, remembered
from stp_fx.ir.provenance import provenance_of
from stp_fx.training.regularizers.blocks import Factor, blocks, square_sums

__all__ = ["RowNorms", "Rows", "cached", "chosen", "kept_positions", "rows_of", "unmasked"]

T = TypeVar("T")
Kept = Mapping[tuple[str, int], torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Position ``index[k]`` of dimension ``dim`` of a tensor belongs to row ``row[k]`` (int64, on the tensor's device)."""

    tensor: str
    dim: int
    index: torch.Tensor
    row: torch.Tensor


class RowNorms:
    """The L2 norms of ``rows`` rows, their sum as a loss, and the gradient of that sum; ``strength`` scales both.

    ``kept[name, dim]`` are the unmasked positions, where some are masked: no row counts masked elements.
    """

    def __init__(self, entries: Sequence[Rows], rows: int, kept: Kept | None = None) -> None:
        self.by_tensor: dict[str, list[Rows]] = {}
        for entry in entries:
            self.by_tensor.setdefault(entry.tensor, []).append(entry)
        self.rows = rows
        self.kept: Kept = kept or {}

    def dtype(self, parameters: Mapping[str, torch.Tensor]) -> torch.dtype:
        """float64 where a parameter is, else float32: the type in which sums are taken."""
        return torch.float64 if any(parameters[name].dtype == torch.float64 for name in self.by_tensor) else torch.float32

    def squares(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Squared norms [rows], float32 or wider, differentiable. An element that is in a row by two axes counts twice."""
        first = next(iter(parameters[name] for name in self.by_tensor))
        total = torch.zeros(self.rows, dtype=self.dtype(parameters), device=first.device)
        for name, entries in self.by_tensor.items():
            weight = parameters[name]
            dims = tuple(dict.fromkeys(entry.dim for entry in entries))
            sums = dict(zip(dims, square_sums(weight, dims, total.dtype, self._keep(name, weight)), strict=True))
            for entry in entries:
                total = total.index_add(0, entry.row, sums[entry.dim][entry.index])
        return total

    def loss(self, parameters: Mapping[str, torch.Tensor], strength: float) -> torch.Tensor:
        """The sum of all norms; the gradient of a row of zeros is zero."""
        squares = self.squares(parameters)
        return float(strength) * squares[squares > 0].sqrt().sum()

    @torch.no_grad()
    def apply_gradients(self, parameters: Mapping[str, torch.Tensor], strength: float) -> float:
        """Adds the gradient of :meth:`loss`; returns the L1 norm of the added gradients."""
        squares = self.squares(parameters)
        return self.add_multiples(parameters, torch.where(squares > 0, float(strength) * squares.rsqrt(), 0.0))

    @torch.no_grad()
    def add_multiples(self, parameters: Mapping[str, torch.Tensor], factor: torch.Tensor) -> float:
        """Adds ``factor`` [rows] times the parameters of each row to their gradients; returns the L1 norm of the added
        gradients."""
        trained = {name: parameters[name] for name in self.by_tensor if parameters[name].requires_grad}
        for name, weight in trained.items():
            if weight.grad is not None and weight.grad.layout != torch.strided:
                raise InputError(f"{name!r} has a sparse gradient, to which nothing dense can be added: use sparse=False")
        total = factor.new_zeros(())
        for name, weight in trained.items():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            keep, scale = self._keep(name, weight), self._scale(name, weight, factor)
            for block in blocks(weight):
                # In the factor's dtype: in half precision one over a small norm is infinite, its product with the weight is not.
                added = weight[block].to(factor.dtype) * scale.of(block)
                added = (added if keep is None else added.mul_(keep.of(block))).to(weight.dtype)
                weight.grad[block].add_(added)
                total += added.abs_().sum(dtype=factor.dtype)  # a twentieth of the time of linalg.vector_norm
        return float(total)

    def _keep(self, name: str, weight: torch.Tensor) -> Factor | None:
        """One at unmasked positions, zero at masked ones; None where none is masked."""
        vectors = {
            dim: weight.new_zeros(weight.shape[dim]).index_fill_(0, self.kept[name, dim], 1.0)
            for dim in range(weight.dim())
            if (name, dim) in self.kept
        }
        return Factor(weight, torch.mul, vectors) if vectors else None

    def _scale(self, name: str, weight: torch.Tensor, values: torch.Tensor) -> Factor:
        """The sum of the ``values`` [rows] of the rows that an element is in."""
        vectors: dict[int, torch.Tensor] = {}
        for entry in self.by_tensor[name]:
            along = vectors.setdefault(entry.dim, values.new_zeros(weight.shape[entry.dim]))
            along.index_add_(0, entry.index, values[entry.row])
        return Factor(weight, torch.add, vectors)


def rows_of(
    gm: fx.GraphModule,
    graph: ChannelGraph,
    groups: Iterable[Group],
    wanted: Callable[[Axis], bool],
    *,
    by_position: bool = False,
) -> RowNorms:
    """A row for every unmasked unit of ``groups`` over all ``wanted`` axes; with ``by_position`` for each position of each.

    Raises:
        InputError: no such axis has an unmasked unit.
    """
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    kept = kept_positions(gm, graph)
    found: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for group in groups:
        for member in group.members:
            axis = member.axis
            known = parameters.get(axis.tensor)
            if known is not None and known.is_floating_point() and wanted(axis):
                alive = np.isin(member.index, kept.get((axis.tensor, axis.dim), member.index))
                unit = group.units[member.unit]
                found.setdefault((axis.tensor, axis.dim), []).append((member.index[alive], unit[alive]))
    entries, count = [], 0 if by_position else graph.units
    for (name, dim), parts in found.items():
        index, row = (np.concatenate(each) for each in zip(*parts, strict=True))
        if by_position:
            index = np.unique(index)
            row = np.arange(len(index)) + count
            count += len(index)
        if len(index):
            device = parameters[name].device
            entries.append(Rows(name, dim, torch.from_numpy(index).to(device), torch.from_numpy(row).to(device)))
    if not entries:
        raise InputError("no unit that may be removed has a parameter that this regularizer acts on")
    alive = {
        (name, dim): torch.from_numpy(positions).to(parameters[name].device)
        for (name, dim), positions in kept.items()
        if name in parameters
    }
    return RowNorms(entries, count, alive)


def kept_positions(gm: fx.GraphModule, graph: ChannelGraph) -> Mapping[tuple[str, int], np.ndarray]:
    """By tensor and dimension: the unmasked positions (int64, sorted), where some are masked."""
    return graph.survivors(provenance_of(gm).masked, partial=True).axes


def unmasked(gm: fx.GraphModule, graph: ChannelGraph) -> np.ndarray:
    """Units that are not masked (bool, one per unit)."""
    return graph.survivors(provenance_of(gm).masked, partial=True).units


def chosen(graph: ChannelGraph, groups: Iterable[Group] | None) -> tuple[Group, ...]:
    """The given groups, or all.

    Raises:
        InputError: a group of another graph.
        NothingToPruneError: no group at all.
    """
    result = graph.groups if groups is None else tuple(groups)
    for group in result:
        if group.index >= len(graph.groups) or graph.groups[group.index] is not group:
            raise InputError(f"group {group.name!r} is of another graph; take the groups of analyze(gm)")
    if not result:
        raise NothingToPruneError("there is no group whose units may be removed, so a regularizer has nothing to act on")
    return tuple(result)


def cached(
    gm: fx.GraphModule,
    groups: Iterable[Group] | None,
    kind: Hashable,
    build: Callable[[ChannelGraph, tuple[Group, ...]], T],
) -> T:
    """``build(graph, groups)``, kept on the graph until its analysis, its masks or its device change."""
    graph, masked = analyze(gm), provenance_of(gm).masked
    groups = chosen(graph, groups)
    device = next((str(p.device) for p in gm.parameters()), None)
    kinds: dict[Hashable, T] = remembered(gm, "regularizers", (Same(graph), Same(masked)), dict)
    key = (kind, tuple(group.index for group in groups), device)
    if key not in kinds:
        kinds[key] = build(graph, groups)
    return kinds[key]
