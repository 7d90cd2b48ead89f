"""The abstract values of the analysis: a tensor dimension is an ordered list of factors.

A factor has a size and either one element id per position or none (fixed: its positions cannot be removed). ``[C]`` is one
factor, a flattened ``C x HW`` two (the second fixed), ``heads x head_dim`` two. A dimension of size one has no factor.
Rules see the analysis through the :class:`Context` protocol only, so this layer knows nothing of how it is solved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

__all__ = ["FIXED", "Context", "Dim", "Dims", "Factor", "TensorDims", "dim_size", "fixed_dim", "fixed_dims", "has_ids"]

FIXED = 0
"""The element that stands for a fixed position inside an otherwise removable factor (a ``cat`` of both kinds)."""


class Factor(NamedTuple):
    """``size`` positions; ``ids`` is an int64 array of that length, or ``None`` if fixed. Arrays are never written to."""

    size: int
    ids: np.ndarray | None


Dim = tuple[Factor, ...]
"""One dimension of a tensor: its factors, outer to inner; empty for a dimension of size one."""

Dims = tuple[Dim, ...]
"""All dimensions of a tensor."""


@dataclasses.dataclass(frozen=True)
class TensorDims:
    """Leaf of a node's recorded value: the factors of one tensor."""

    dims: Dims


def dim_size(dim: Dim) -> int:
    """How many positions a dimension has."""
    size = 1
    for factor in dim:
        size *= factor.size
    return size


def has_ids(dim: Dim) -> bool:
    """Whether any position of a dimension could be removed."""
    return any(factor.ids is not None for factor in dim)


def fixed_dim(size: int) -> Dim:
    """A dimension of ``size`` positions that cannot be removed."""
    return () if size == 1 else (Factor(size, None),)


def fixed_dims(shape: Sequence[int]) -> Dims:
    """The dimensions of a tensor of which nothing can be removed."""
    return tuple(fixed_dim(int(size)) for size in shape)


class Context(Protocol):
    """The questions that a rule may ask the analysis about one ATen op."""

    def dims(self, tensor: torch.Tensor) -> Dims:
        """The factors of a tensor; all fixed for one that no rule has described."""
        ...

    def assign(self, tensor: torch.Tensor, dims: Dims) -> None:
        """States the factors of an op's result."""
        ...

    def unify(self, first: Dim, second: Dim) -> Dim:
        """The positions of two dimensions of one size are removed together; returns the finer of both."""
        ...

    def pin(self, dim: Dim, reason: str) -> None:
        """No position of ``dim`` can be removed."""
        ...

    def inexact(self, dim: Dim, reason: str) -> None:
        """Removing from ``dim`` is allowed, but is not the same as masking: the op normalises or reduces over it."""
        ...

    def several(self, dim: Dim, least: int) -> None:
        """At least so many positions of ``dim`` have to stay: the op gives no number for fewer."""
        ...

    def excludes(self, source: torch.Tensor, dim: int, value: float, least: int, reason: str) -> bool:
        """The op ignores positions of ``source`` that read ``value`` along ``dim``, and chooses ``least`` of the others (0: it
        chooses none); False where no mask can make them read it."""
        ...

    def state_numbers(self, tensor: torch.Tensor, dim: Dim, kind: str) -> None:
        """The values of ``tensor`` say something about the positions of ``dim``: ``"position"``, ``"count"`` or ``"end"``."""
        ...

    def numbers_in(self, tensor: torch.Tensor, kind: str) -> Dim | None:
        """The dimension that the values of ``tensor`` are about. A rule that asks keeps them right, or pins the dimension."""
        ...

    def contract(
        self,
        letters: Sequence[Dim],
        contracted: Sequence[Dim],
        multiplier: int,
        carriers: Sequence[Sequence[torch.Tensor]],
        *,
        distance: bool = False,
    ) -> None:
        """``multiplier`` x the product of all ``letters``' sizes multiply-accumulates, summing over ``contracted``.

        ``carriers`` are, for each contracted dimension, the operands that have it; a term of the sum is zero where one of them is
        (a product), or only where all are (``distance``).
        """
        ...

    def reads(self, tensor: torch.Tensor, role: str, out: int | None = None, into: int | None = None) -> None:
        """``tensor`` plays ``role`` in this op (weight, scale, bias, buffer); its output and input dims, if it is a weight."""
        ...

    def literal_axis(self, size: int, what: str) -> Dim:
        """A new axis whose size is written in the graph; fixed where the graph cannot be rewritten."""
        ...

    def flat(self, dim: Dim) -> np.ndarray:
        """One element id per position; a product of factors becomes derived elements, fixed positions ``FIXED``."""
        ...

    def positions(self, ids: np.ndarray) -> Dim:
        """A dimension made of the given elements, in their order; a single element is pinned, since it cannot go alone."""
        ...

    def regroup(self, dims: Sequence[Dim], shape: Sequence[int]) -> Dims:
        """``view``: the same positions in row-major order, cut at other places."""
        ...

    def constant(self, tensor: torch.Tensor) -> np.ndarray | None:
        """The values of a small integer tensor that the graph holds (a buffer, a literal list), else ``None``."""
        ...

    def renumber(self, tensor: torch.Tensor, ids: np.ndarray) -> None:
        """The values of the buffer ``tensor`` are positions in ``ids``: a rewrite must renumber them."""
        ...

    @property
    def editable(self) -> bool:
        """Whether literals of the graph node at hand can be rewritten."""
        ...

    @property
    def unread(self) -> bool:
        """Whether no number of what the graph node at hand gives is read, only its sizes."""
        ...
