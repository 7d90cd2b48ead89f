"""The parts of a picture, as plain data."""

from __future__ import annotations

import dataclasses

__all__ = ["Call", "Drawing"]


@dataclasses.dataclass(frozen=True)
class Call:
    """One node of a graph that passes tensors on.

    ``op`` and ``inputs`` as in torch.fx; ``call`` is the name of the module's class or of the function, ``path`` the module
    called ("" for anything else), ``scopes`` the calls of modules around it, outermost first. ``carried`` are the groups whose
    channels its value has, ``stored`` those that cut a parameter of the module called; both as indices into
    :attr:`Drawing.groups`.
    """

    name: str
    op: str
    call: str
    path: str
    inputs: tuple[str, ...]
    scopes: tuple[str, ...]
    carried: frozenset[int]
    stored: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A network to draw: its calls in graph order, its groups as (name, number of units), and the fraction that a plan removes of
    each (nothing without a plan)."""

    calls: tuple[Call, ...]
    groups: tuple[tuple[str, int], ...]
    removed: tuple[float, ...] = ()
