"""One ATen call as a rule sees it: the op, its arguments by name, its results, and what may be stated about them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stp_fx.rules.domain import Context, Dim, Dims

__all__ = ["OpCall", "dim_list", "tensors_in"]


@functools.lru_cache(maxsize=4096)
def _schema_of(func: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of an op's arguments in order, and the defaults."""
    arguments = func._schema.arguments
    return tuple(a.name for a in arguments), {a.name: a.default_value for a in arguments if a.has_default_value()}


class OpCall:
    """A call of ``func`` that the analysis looks at; every rule takes one.

    ``call["dim"]`` is an argument by its name in the op's schema, defaults included. ``args``, ``kwargs`` and ``out`` are the
    call as it was made; ``outs`` lists the tensors among the results. The other methods are those of
    :class:`~stp_fx.rules.Context`: they read and state the factors of tensors.
    """

    __slots__ = ("_bound", "_operands", "_outs", "args", "ctx", "func", "kwargs", "out")

    def __init__(self, ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.ctx, self.func, self.args, self.kwargs, self.out = ctx, func, args, kwargs, out
        self._bound: dict[str, Any] | None = None
        self._operands: list[torch.Tensor] | None = None
        self._outs: list[torch.Tensor] | None = None

    # -- the call ----------------------------------------------------------------------------------------------------

    @property
    def bound(self) -> dict[str, Any]:
        """All arguments by schema name, defaults included."""
        if self._bound is None:
            names, defaults = _schema_of(self.func)
            self._bound = {**defaults, **dict(zip(names, self.args, strict=False)), **self.kwargs}
        return self._bound

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by schema name, or ``default`` where the op has none of this name."""
        return self.bound.get(name, default)

    @property
    def name(self) -> str:
        """The op's name without namespace and overload (``"max_pool2d"``)."""
        return self.func.__name__.partition(".")[0]

    @property
    def outs(self) -> list[torch.Tensor]:
        """The tensors among the results, in order."""
        if self._outs is None:
            self._outs = tensors_in(self.out)
        return self._outs

    @property
    def operands(self) -> list[torch.Tensor]:
        """The tensors among the arguments, in order, those in lists and those given by keyword included."""
        if self._operands is None:
            self._operands = tensors_in(self.args) + tensors_in(self.kwargs) if self.kwargs else tensors_in(self.args)
        return self._operands

    # -- the analysis ------------------------------------------------------------------------------------------------

    def dims(self, tensor: torch.Tensor) -> Dims:
        """The factors of a tensor; all fixed for a tensor that no rule has described."""
        return self.ctx.dims(tensor)

    def assign(self, tensor: torch.Tensor, dims: Dims) -> None:
        """States the factors of a result."""
        self.ctx.assign(tensor, dims)

    def unify(self, first: Dim, second: Dim) -> Dim:
        """The positions of two dimensions of one size are removed together; returns the finer of both."""
        return self.ctx.unify(first, second)

    def pin(self, dim: Dim, reason: str) -> None:
        """No position of ``dim`` can be removed."""
        self.ctx.pin(dim, reason)

    def inexact(self, dim: Dim, reason: str) -> None:
        """Removing from ``dim`` is allowed, but is not the same as masking."""
        self.ctx.inexact(dim, reason)

    def several(self, dim: Dim, least: int) -> None:
        """At least so many positions of ``dim`` have to stay."""
        self.ctx.several(dim, least)

    def excludes(self, source: torch.Tensor, dim: int, value: float, least: int, reason: str) -> bool:
        """Positions that read ``value`` along ``dim`` of ``source`` are never among the ``least`` that are chosen."""
        return self.ctx.excludes(source, dim, value, least, reason)

    def state_numbers(self, tensor: torch.Tensor, dim: Dim, kind: str) -> None:
        """The values of ``tensor`` are about the positions of ``dim``: ``"position"``, ``"count"`` or ``"end"``."""
        self.ctx.state_numbers(tensor, dim, kind)

    def numbers_in(self, tensor: torch.Tensor, kind: str) -> Dim | None:
        """The dimension that the values of ``tensor`` are about. A rule that asks keeps them right, or pins the dimension."""
        return self.ctx.numbers_in(tensor, kind)

    def contract(
        self,
        letters: Sequence[Dim],
        contracted: Sequence[Dim],
        multiplier: int,
        carriers: Sequence[Sequence[torch.Tensor]] | None = None,
        *,
        distance: bool = False,
    ) -> None:
        """``multiplier`` x the product of all ``letters``' sizes multiply-accumulates, summing over ``contracted``.

        ``carriers`` are, for each contracted dimension, the operands that have it; all operands unless given. A term of the sum
        is zero where one of them is, or only where all are (``distance``).
        """
        carriers = [self.operands] * len(contracted) if carriers is None else carriers
        self.ctx.contract(letters, contracted, multiplier, carriers, distance=distance)

    def reads(self, tensor: torch.Tensor, role: str, out: int | None = None, into: int | None = None) -> None:
        """``tensor`` plays ``role`` in this op (weight, scale, bias, buffer); its output and input dims, if it is a weight."""
        self.ctx.reads(tensor, role, out, into)

    def literal_axis(self, size: int, what: str) -> Dim:
        """A new axis whose size is written in the graph; fixed where the graph cannot be rewritten."""
        return self.ctx.literal_axis(size, what)

    def flat(self, dim: Dim) -> np.ndarray:
        """One element id per position; a product of factors becomes derived elements, fixed positions ``FIXED``."""
        return self.ctx.flat(dim)

    def positions(self, ids: np.ndarray) -> Dim:
        """A dimension made of the given elements, in their order; a single element is pinned, since it cannot go alone."""
        return self.ctx.positions(ids)

    def regroup(self, dims: Sequence[Dim], shape: Sequence[int]) -> Dims:
        """``view``: the same positions in row-major order, cut at other places."""
        return self.ctx.regroup(dims, shape)

    def constant(self, tensor: torch.Tensor) -> np.ndarray | None:
        """The values of a small integer tensor that the graph holds, else ``None``."""
        return self.ctx.constant(tensor)

    def renumber(self, tensor: torch.Tensor, ids: np.ndarray) -> None:
        """The values of the buffer ``tensor`` are positions in ``ids``: a rewrite must renumber them."""
        self.ctx.renumber(tensor, ids)

    @property
    def editable(self) -> bool:
        """Whether literals of the graph node at hand can be rewritten."""
        return self.ctx.editable

    @property
    def unread(self) -> bool:
        """Whether no number of what the graph node at hand gives is read, only its sizes."""
        return self.ctx.unread


def dim_list(dim: Any, rank: int) -> list[int]:
    """Non-negative dimensions; all of them for ``None`` or an empty list."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(rank))
    if rank == 0:
        return []
    return sorted({d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])})


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Tensors in nested lists, tuples and dicts, in order."""
    found: list[torch.Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, torch.Tensor):
                found.append(item)
            elif isinstance(item, (list, tuple, dict)):
                _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
