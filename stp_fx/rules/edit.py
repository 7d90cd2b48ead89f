"""A call of the graph that is being rewritten, with its arguments by name: what a handler of literals gets."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import fx

from stp_fx.rules.domain import Dim, Dims, dim_size

__all__ = ["Edit", "Signature"]

_FIRST = ("input", "self", "tensor", "x")
"""How torch names the tensor that a call is about."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """Names of a Python call's arguments, each with its aliases; ``star`` is the one that may be spelled out."""

    names: tuple[tuple[str, ...], ...]
    star: int | None = None

    @classmethod
    @functools.cache
    def of(cls, text: str) -> Signature:
        """Reads ``"input *shape/size"``."""
        words = text.split()
        star = next((k for k, word in enumerate(words) if word.startswith("*")), None)
        names = tuple(tuple(word.lstrip("*").split("/")) for word in words)
        return cls(tuple((*each, *_FIRST) if each[0] == "input" else each for each in names), star)

    def name_at(self, where: int | str) -> str:
        """The name of the argument at a position or under a keyword."""
        if isinstance(where, int):
            at = where if self.star is None else min(where, self.star)
            return self.names[at][0] if at < len(self.names) else ""
        return next((each[0] for each in self.names if where in each), where)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int | str]:
        """Where each argument that a call has is: at a position or under a keyword."""
        found: dict[str, int | str] = {}
        for where in (*range(len(args)), *kwargs):
            found.setdefault(self.name_at(where) or f"argument {where}", where)
        return found

    def aliases(self, name: str) -> tuple[str, ...]:
        """All spellings of an argument's name."""
        return next((each for each in self.names if each[0] == name), (name,))

    def position(self, name: str) -> int | None:
        """Where an argument stands if it is not given by keyword."""
        return next((k for k, each in enumerate(self.names) if each[0] == name), None)


@dataclasses.dataclass
class Edit:
    """One node of the graph being rewritten, with everything a handler needs.

    Arguments are read by name, however the call spells them: ``edit["dim"]`` as the new graph has it (numbers are numbers,
    tensors are meta), ``edit.old("dim")`` with the numbers of the old graph, whose axes old positions belong to, and
    ``edit.raw("dim")`` as it is written. ``source`` are the old factors of the first tensor operand, ``result`` those of the
    value, ``operand("input")`` those of an argument. ``keep`` tells which positions of an old dimension stay. Handlers write with
    :meth:`set` and :meth:`renew`, or to ``node.args``, ``node.kwargs``, ``node.target``.
    """

    node: fx.Node
    signature: Signature
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    old_args: tuple[Any, ...]
    old_kwargs: dict[str, Any]
    values: Callable[[Any], Any]
    """The recorded value of a raw argument."""
    before: Callable[[Any], Any]
    """A raw argument, with numbers that changed as they were without the removal."""
    source: Dims
    result: Any
    keep: Callable[[Dim], np.ndarray]
    module: Any = None

    def __post_init__(self) -> None:
        self.where = self.signature.bind(self.node.args, self.node.kwargs)

    # -- axes --------------------------------------------------------------------------------------------------------

    def size(self, dim: Dim) -> int:
        """How many positions of an old dimension stay."""
        return int(self.keep(dim).sum()) if dim else 1

    def changed(self, dim: Dim) -> bool:
        """Whether positions of an old dimension are removed."""
        return self.size(dim) != dim_size(dim)

    def result_dims(self) -> Dims:
        """The old factors of the value, which is one tensor."""
        return self.result.dims

    # -- arguments ---------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        return self._at(name, self.args, self.kwargs)

    def get(self, name: str, default: Any = None) -> Any:
        """An argument as the new graph has it."""
        return self[name] if name in self.where else default

    def old(self, name: str, default: Any = None) -> Any:
        """An argument with the numbers of the old graph."""
        return self._at(name, self.old_args, self.old_kwargs) if name in self.where else default

    def raw(self, name: str) -> Any:
        """An argument as it is written."""
        return self._at(name, self.node.args, self.node.kwargs)

    def operand(self, name: str) -> Any:
        """The recorded value of an argument: a ``TensorDims`` for a tensor."""
        return self.values(self.raw(name)) if name in self.where else None

    def _at(self, name: str, args: Any, kwargs: Any) -> Any:
        where = self.where[name]
        return args[where] if isinstance(where, int) else kwargs[where]

    def set(self, name: str, value: Any) -> None:
        """Replaces an argument where the call has it; adds it as a keyword if it has not."""
        where = self.where.get(name, name)
        if isinstance(where, int):
            self.node.update_arg(where, value)
        else:
            self.node.update_kwarg(where, value)

    def renew(self, name: str, value: Any) -> None:
        """Writes ``value`` unless the argument has it already; what is computed in the graph stays computed."""
        if self.get(name) != value:
            self.set(name, value)

    def write(self, name: str, value: Any) -> None:
        """Replaces an argument unless it is written that way already."""
        if self.raw(name) != value:
            self.set(name, value)

    def freeze(self, name: str) -> None:
        """Gives the numbers of an argument the values that they would have without the removal."""
        self.write(name, self.before(self.raw(name)))

    def spelled(self, name: str) -> tuple[Any, list[Any], Callable[[list[Any]], None]] | None:
        """(raw sizes, their values, what writes them back) of ``f(x, 1, 2)``, ``f(x, (1, 2))`` or ``f(x, size=(1, 2))``.

        The raw sizes are a node where the graph computes them as one tuple (``x.view(x.size()[:-1] + (3,))``). None without
        such an argument, or where it is not sizes (``x.view(torch.int8)``).
        """
        if name not in self.where:
            return None
        where, value = self.where[name], self[name]
        if isinstance(where, str) or isinstance(value, (list, tuple)):
            return self.raw(name), list(value), lambda sizes: self.set(name, tuple(sizes))
        if not isinstance(value, int):
            return None
        head = self.node.args[:where]
        return list(self.node.args[where:]), list(self.args[where:]), lambda new: setattr(self.node, "args", (*head, *new))
