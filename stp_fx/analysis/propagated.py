"""The findings of one run over a graph: axes, values as factors, contractions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from stp_fx.analysis.elements import Elements
from stp_fx.analysis.flow import FlowNode
from stp_fx.rules import Dim, TensorDims

__all__ = ["AxisRecord", "Contraction", "Propagated"]


@dataclasses.dataclass
class AxisRecord:
    """One dimension of a parameter or buffer, with the elements of its positions."""

    tensor: str
    dim: int
    ids: np.ndarray
    role: str
    side: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Contraction:
    """``multiplier`` x the sizes of all ``letters`` multiply-accumulates in ``node``, summing over ``contracted``."""

    node: str
    letters: tuple[Dim, ...]
    contracted: tuple[Dim, ...]
    multiplier: int


@dataclasses.dataclass
class Propagated:
    """The findings of one run over the graph."""

    elements: Elements
    axes: list[AxisRecord]
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    values: dict[str, Any]
    contractions: list[Contraction]
    renumbered: dict[str, np.ndarray]
    unknown: dict[str, list[str]]
    flow: list[FlowNode] = dataclasses.field(default_factory=list)

    def pieces(self) -> Iterator[np.ndarray]:
        """The element arrays of which something must be left: those that values of the graph are made of, each once or more,
        and parts of what must keep several."""
        yield from self.elements.parts
        pending = list(self.values.values())
        while pending:
            value = pending.pop()
            if isinstance(value, TensorDims):
                yield from (factor.ids for dim in value.dims for factor in dim if factor.ids is not None)
            elif isinstance(value, (list, dict)):
                pending.extend(value.values() if isinstance(value, dict) else value)
