"""Random networks as plain data: a :class:`Recipe` prints as code that builds the same network again.

A network is a chain of blocks and a head. A block is an ``nn.Module`` made from a :class:`Spec` (its kind and options) at a
:class:`Shape`; blocks that hold other blocks (residual, concat ...) have specs among their options.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import nn

__all__ = ["BLOCKS", "Block", "Chain", "Network", "Pick", "Recipe", "Shape", "Spec", "block", "make", "project", "spec"]

Choice = TypeVar("Choice")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The tensor between blocks: ``"map"`` is [batch, channels, *size], ``"tokens"`` is [batch, *size, channels].

    ``free``: the network works at other sizes too.
    """

    layout: str
    channels: int
    size: tuple[int, ...]
    free: bool = True

    @property
    def rank(self) -> int:
        """How many spatial dimensions there are."""
        return len(self.size)

    @property
    def axis(self) -> int:
        """The channel dimension."""
        return 1 if self.layout == "map" else 2

    @property
    def per_channel(self) -> tuple[int, ...]:
        """The shape of one number a channel, ready to broadcast."""
        return (self.channels, *[1] * self.rank) if self.layout == "map" else (self.channels,)

    def to(self, **changes: Any) -> Shape:
        """This shape with fields replaced."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A block to be made: its kind, and what its class takes beside the shape."""

    kind: str
    options: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"spec({', '.join([repr(self.kind), *(f'{k}={_code(v)}' for k, v in self.options.items())])})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For hypothesis, which would spell the dataclass out."""
        printer.text(repr(self))


def spec(kind: str, **options: Any) -> Spec:
    """The spec of one block, as recipes print it."""
    return Spec(kind, options)


def _code(value: Any) -> str:
    if isinstance(value, (list, tuple)) and any(isinstance(v, (Spec, list, tuple)) for v in value):
        return "[" + ", ".join(map(_code, value)) + "]"
    return repr(value)


class Pick(Protocol):
    """How a block class chooses its options; hypothesis stands behind it."""

    def number(self, low: int, high: int) -> int: ...

    def of(self, *choices: Choice) -> Choice: ...

    def flag(self) -> bool: ...

    def width(self) -> int:
        """A number of channels."""
        ...

    def divisor(self, number: int) -> int:
        """A divisor of ``number`` that is more than 1, but ``number`` itself only if it is prime."""
        ...

    def body(self, at: Shape) -> list[Spec]:
        """Blocks that keep layout and size, for a branch."""
        ...

    def order(self, length: int) -> list[int]:
        """A permutation."""
        ...


class Block(nn.Module):
    """Base of all blocks. ``shape`` is what comes out.

    ``columns`` names own parameters that are read along an input axis (``{"weight": 1}``), beyond those of the convolutions
    and linears inside. ``columns_suffice`` says that zeroing input columns silences every consumer in the block, so that
    the simple oracle holds. ``makes_channels`` says that constant channels come out which no parameter names: no oracle sees
    from a plan that one of them was removed, unless all that reads them is input columns.
    """

    kind: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]] = ("map", "tokens")
    ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)
    resizes: ClassVar[bool] = False
    columns: Mapping[str, int] = MappingProxyType({})
    columns_suffice: bool = True
    makes_channels: ClassVar[bool] = False

    def __init__(self, at: Shape) -> None:
        super().__init__()
        self.at = at
        self.shape: Shape = at

    @classmethod
    def fits(cls, at: Shape) -> bool:
        """Whether a block of this kind can stand at ``at`` (layout and rank are checked already)."""
        return True

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {}


BLOCKS: dict[str, type[Block]] = {}
"""Every kind of block, the simplest first: hypothesis shrinks towards the front."""


def block(kind: str) -> Any:
    """Registers a block class under its kind."""

    def register(cls: type[Block]) -> type[Block]:
        if kind in BLOCKS:
            raise ValueError(f"two blocks of kind {kind!r}")
        cls.kind = kind
        BLOCKS[kind] = cls
        return cls

    return register


def make(each: Spec, at: Shape) -> Block:
    return BLOCKS[each.kind](at, **each.options)


class Chain(nn.Sequential):
    """Blocks one after another."""

    def __init__(self, at: Shape, specs: Sequence[Spec]) -> None:
        super().__init__()
        self.shape: Shape = at
        for position, each in enumerate(specs):
            made = make(each, self.shape)
            self.add_module(f"{position}_{each.kind}", made)
            self.shape = made.shape


def project(at: Shape, out: int, *, bias: bool = True) -> nn.Module:
    """A pointwise linear map of the channels in either layout."""
    if at.layout == "tokens":
        return nn.Linear(at.channels, out, bias=bias)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[at.rank - 1](at.channels, out, 1, bias=bias)


class Network(nn.Module):
    """A recipe, built."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.body: Chain = Chain(recipe.input, recipe.body)
        self.head: Block = make(recipe.head, self.body.shape)
        self.free: bool = self.head.shape.free

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(x))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A network as plain data. ``vocabulary``: inputs are integers below it, and the first block embeds them."""

    input: Shape
    body: Sequence[Spec]
    head: Spec
    seed: int = 0
    vocabulary: int = 0

    def build(self) -> Network:
        """The network in double precision and eval mode; the same numbers every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = Network(self)
            randomise(network)
        return network.double().eval()

    def inputs(self, batch: int = 2, *, scale: int = 1, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Random inputs; ``scale`` multiplies every spatial size."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        size = [scale * s for s in self.input.size]
        if self.vocabulary:
            return (torch.randint(self.vocabulary, (batch, *size), generator=generator),)
        sizes = [batch, self.input.channels, *size] if self.input.layout == "map" else [batch, *size, self.input.channels]
        return (torch.randn(sizes, generator=generator, dtype=torch.float64),)

    def kinds(self) -> set[str]:
        """The kinds of all blocks, nested ones too."""
        return {kind for each in (*self.body, self.head) for kind in _kinds(each)}

    def __repr__(self) -> str:
        body = textwrap.indent("".join(f"{each!r},\n" for each in self.body), "    ")
        extra = f", vocabulary={self.vocabulary}" if self.vocabulary else ""
        return f"Recipe({self.input!r}, [\n{body}], {self.head!r}, seed={self.seed}{extra})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For hypothesis, which would spell the dataclass out."""
        printer.text(repr(self))


def _kinds(value: Any) -> set[str]:
    if isinstance(value, Spec):
        return {value.kind}.union(*(_kinds(v) for v in value.options.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(_kinds, value))
    return set()


def randomise(module: nn.Module) -> None:
    """Moves every vector off its default: biases of 0, scales of 1 and fresh running statistics hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.4 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.5)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
