"""How a construct is written down: a small network around one thing that users write, and what must become of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

CONSTRUCTS: dict[str, Construct] = {}


@dataclasses.dataclass(frozen=True)
class Construct:
    """``axis`` is the interesting one; ``expect`` says what becomes of it at ratio 0.5:

    - "exact": it is pruned, and masking equals removing;
    - "inexact": it is pruned, and an op normalises or reduces over it;
    - "pinned": it stays whole, and `explain` gives ``reason``;
    - "sound": either; what is pruned is pruned right, what is not is explained.

    A ``reason`` beside "exact" or "inexact" is why some positions of the axis stay. ``columns`` says that every consumer is a
    weight's input column, so that the simple oracle holds beside the general one.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    expect: str
    axis: str = "a.weight:0"
    reason: str = ""
    columns: bool = False


def image(*size: int, channels: int = 3) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Inputs [batch, channels, *size]."""
    return lambda batch=2: (torch.randn(batch, channels, *(size or (6, 6))),)


def tokens(length: int = 5, channels: int = 4) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Inputs [batch, length, channels]."""
    return lambda batch=2: (torch.randn(batch, length, channels),)


def integers(length: int = 5, vocabulary: int = 7) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Inputs [batch, length] of token numbers."""
    return lambda batch=2: (torch.randint(vocabulary, (batch, length)),)


class Around(nn.Module):
    """``a`` makes 8 channels, ``f`` is the construct, ``b`` reads what comes out, ``c`` ends: ``b`` can always be pruned."""

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor], out: int, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.c = layer(3 if layer is conv else 4, 8), layer(out, 6), layer(6, 3)
        if isinstance(f, nn.Module):
            self.f = f
        else:
            self.call = f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.a(x))
        y = self.f(y) if hasattr(self, "f") else self.call(y)
        return self.c(torch.tanh(self.b(y)))


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def add(construct: Construct) -> None:
    if construct.name in CONSTRUCTS:
        raise ValueError(f"two constructs called {construct.name!r}")
    CONSTRUCTS[construct.name] = construct


def maps(name: str, f: Any, expect: str, reason: str = "", *, out: int = 8, columns: bool = False) -> None:
    """A construct on [batch, 8, 6, 6] between convolutions. ``f``: a function, or a module class."""
    add(Construct(name, lambda: Around(_made(f), out, conv), image(), expect, reason=reason, columns=columns))


def rows(name: str, f: Any, expect: str, reason: str = "", *, out: int = 8, columns: bool = False) -> None:
    """A construct on [batch, 5, 8] between linears."""
    add(Construct(name, lambda: Around(_made(f), out, nn.Linear), tokens(), expect, reason=reason, columns=columns))


def _made(f: Any) -> Any:
    return f() if isinstance(f, type) and issubclass(f, nn.Module) else f


def network(
    name: str,
    expect: str,
    inputs: Callable[[], tuple[Any, ...]] | None = None,
    *,
    axis: str = "a.weight:0",
    reason: str = "",
    columns: bool = False,
) -> Any:
    """Decorates a whole network."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        add(Construct(name, cls, inputs or image(), expect, axis, reason, columns))
        return cls

    return register
