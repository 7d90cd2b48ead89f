"""Hypothesis strategies: whole networks, and what to ask of the library."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import strategies as st

from stp_fx.testing import blocks  # noqa: F401 - registers every kind of block
from stp_fx.testing.recipe import BLOCKS, Recipe, Shape, Spec, make

__all__ = ["Request", "networks", "networks_with", "requests", "residual_networks", "token_networks"]

Choice = TypeVar("Choice")

_ENDS = ("embed", "head", "language", "identity")
_HOLD_BLOCKS = ("residual", "projected", "concat", "split", "gate", "stack", "in_place", "unet")
_WIDEST = 16
_WIDTHS = [4, 6, 3, 8, 2, 9, 12, 5]
_SIDES = {1: [6, 8, 5, 4], 2: [4, 6, 5], 3: [4, 3]}
_LENGTHS = ((2, 5), (1, 2), (1, 2))
"""The fewest and most blocks in a row, by depth of nesting: less than 5 ms for a forward pass."""
_MOST_WEIGHT = 5
"""A file of blocks is drawn as often as it has blocks that fit, up to this: attention is one file among seven."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of ``prune_graph``; scores are random, a function of ``seed``."""

    ratio: float = 0.5
    seed: int = 0
    scope: str = "local"
    products: str = "auto"


def requests() -> st.SearchStrategy[Request]:
    """Random plans: which units go, how many, in which factor of a product."""
    return st.builds(
        Request,
        ratio=st.sampled_from([0.5, 0.3, 0.7, 0.2, 0.6]),
        seed=st.integers(0, 50),
        scope=st.sampled_from(["local", "global"]),
        products=st.sampled_from(["auto", "inner", "outer", "both"]),
    )


@st.composite
def networks(draw: Callable[..., Any]) -> Recipe:
    """A network over a map of one to three dimensions, or over tokens.

    >>> from hypothesis import find
    >>> find(networks(), lambda recipe: "attention" in recipe.kinds())  # doctest: +SKIP
    """
    layout, rank = draw(st.sampled_from([("map", 2), ("tokens", 1), ("map", 1), ("map", 3), ("map", 2), ("tokens", 1)]))
    at = Shape(layout, draw(st.integers(1, 4)), (draw(st.sampled_from(_SIDES[rank])),) * rank)
    pick = _Pick(draw)
    width = pick.width()
    inside, body = at.to(channels=width), [_stem(pick, at, width)]
    for each in pick.chain(inside, steady=False):
        body.append(each)
        inside = make(each, inside).shape
    return Recipe(at, body, pick.head(inside), seed=draw(st.integers(0, 20)))


@st.composite
def networks_with(draw: Callable[..., Any], kind: str) -> Recipe:
    """A network around one block of a given kind, so that every kind is looked at."""
    cls, pick = BLOCKS[kind], _Pick(draw)
    places: dict[tuple[str, int], list[Shape]] = {}
    for layout, rank in [("map", rank) for rank in cls.ranks] + [("tokens", 1)]:
        shapes = (Shape(layout, width, (side,) * rank) for width in _WIDTHS for side in _SIDES[rank])
        if found := [shape for shape in shapes if layout in cls.layouts and cls.fits(shape)]:
            places[layout, rank] = found
    inside = draw(st.sampled_from(places[draw(st.sampled_from(list(places)))]))
    seed, block = draw(st.integers(0, 20)), Spec(kind, cls.options(pick, inside))
    if kind in ("embed", "language", "head"):
        at = inside.to(channels=1) if kind != "head" else inside
        head = pick.head(make(block, at).shape) if kind == "embed" else Spec("identity", {})
        return Recipe(at, [block], head, seed, vocabulary=0 if kind == "head" else 7)
    at = inside.to(channels=draw(st.integers(1, 4)))
    body = [_stem(pick, at, inside.channels), Spec("act", {"name": "sigmoid"}), block]
    return Recipe(at, body, pick.head(make(block, inside).shape), seed)


def _stem(pick: _Pick, at: Shape, width: int) -> Spec:
    """The first layer: its channels can be pruned, the input's cannot."""
    if at.layout == "tokens":
        return Spec("linear", {"out": width, "bias": pick.flag()})
    return Spec("conv", {"out": width, "kernel": 3, "bias": pick.flag(), "padding": "zeros"})


@st.composite
def token_networks(draw: Callable[..., Any]) -> Recipe:
    """A network over integers: an embedding, blocks, and class or next-token outputs (tied or not)."""
    at = Shape("tokens", 1, (draw(st.integers(2, 6)),))
    pick = _Pick(draw)
    seed = draw(st.integers(0, 20))
    if draw(st.booleans()):
        options = BLOCKS["language"].options(pick, at)
        return Recipe(at, [Spec("language", options)], Spec("identity", {}), seed, vocabulary=7)
    body = [Spec("embed", BLOCKS["embed"].options(pick, at))]
    inside = make(body[0], at).shape
    for each in pick.chain(inside, steady=False):
        body.append(each)
        inside = make(each, inside).shape
    return Recipe(at, body, pick.head(inside), seed, vocabulary=7)


@st.composite
def residual_networks(draw: Callable[..., Any]) -> Recipe:
    """A chain of residual branches over a map or over tokens, some with a branch inside, in every spelling of the sum."""
    layout, rank = draw(st.sampled_from([("map", 2), ("tokens", 1), ("map", 1)]))
    at = Shape(layout, draw(st.integers(1, 4)), (draw(st.sampled_from(_SIDES[rank])),) * rank)
    pick = _Pick(draw, depth=len(_LENGTHS) - 2)
    width = pick.width()
    inside, body = at.to(channels=width), [_stem(pick, at, width)]
    for _ in range(pick.number(2, 4)):
        body.append(_residual(pick, inside, nested=pick.flag()))
        if pick.flag():
            body.append(Spec("act", {"name": "relu"}))
    return Recipe(at, body, pick.head(inside), seed=draw(st.integers(0, 20)))


def _residual(pick: _Pick, at: Shape, *, nested: bool) -> Spec:
    """A residual branch that begins with a layer."""
    body = [_stem(pick, at, at.channels), *pick.body(at)]
    if nested:
        body.insert(pick.number(0, len(body)), _residual(pick, at, nested=False))
    return Spec("residual", {"body": body, "how": pick.of("+", "add_", "sub", "scaled")})


class _Pick:
    """:class:`~stp_fx.testing.recipe.Pick` by hypothesis."""

    def __init__(self, draw: Callable[..., Any], depth: int = 0) -> None:
        self._draw = draw
        self._depth = depth

    def number(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def of(self, *choices: Choice) -> Choice:
        return self._draw(st.sampled_from(choices))

    def flag(self) -> bool:
        return self._draw(st.booleans())

    def width(self) -> int:
        return self._draw(st.sampled_from(_WIDTHS))

    def divisor(self, number: int) -> int:
        proper = [d for d in range(2, number) if number % d == 0]
        return self.of(*proper) if proper else max(number, 1)

    def order(self, length: int) -> list[int]:
        return list(self._draw(st.permutations(range(length))))

    def body(self, at: Shape) -> list[Spec]:
        return _Pick(self._draw, self._depth + 1).chain(at, steady=True)

    def head(self, at: Shape) -> Spec:
        return Spec("head", BLOCKS["head"].options(self, at))

    def chain(self, at: Shape, *, steady: bool) -> list[Spec]:
        """Blocks that fit one after another; ``steady`` ones keep layout and size."""
        specs: list[Spec] = []
        for _ in range(self.number(*_LENGTHS[self._depth])):
            each = self.block(at, steady)
            specs.append(each)
            at = make(each, at).shape
        return specs

    def block(self, at: Shape, steady: bool) -> Spec:
        nested = self._depth + 1 < len(_LENGTHS)
        kinds = [k for k in _kinds(at.layout, at.rank, steady, nested) if BLOCKS[k].fits(at) and _narrow(k, at)]
        themes = collections.Counter(BLOCKS[k].__module__ for k in kinds)
        theme = self.of(*(name for name, count in themes.items() for _ in range(min(count, _MOST_WEIGHT))))
        kind = self.of(*(k for k in kinds if BLOCKS[k].__module__ == theme))
        return Spec(kind, BLOCKS[kind].options(self, at))


def _narrow(kind: str, at: Shape) -> bool:
    """Keeps widths small where blocks would pile them up."""
    return at.channels <= _WIDEST or kind in ("conv", "strided", "linear", "projected", "glu")


@functools.cache
def _kinds(layout: str, rank: int, steady: bool, nested: bool) -> tuple[str, ...]:
    return tuple(
        kind
        for kind, cls in BLOCKS.items()
        if layout in cls.layouts
        and rank in cls.ranks
        and kind not in _ENDS
        and (nested or kind not in _HOLD_BLOCKS)
        and not (steady and cls.resizes)
    )
