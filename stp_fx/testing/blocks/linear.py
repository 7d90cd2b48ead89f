"""Linear layers on channels-last values, and the ways between maps and tokens."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.testing.recipe import Block, Pick, Shape, block


@block("linear")
class Linear(Block):
    layouts = ("tokens",)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"out": pick.width(), "bias": pick.flag()}

    def __init__(self, at: Shape, out: int, bias: bool = True) -> None:
        super().__init__(at)
        self.linear = nn.Linear(at.channels, out, bias=bias)
        self.shape = at.to(channels=out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@block("mlp")
class Mlp(Block):
    """Two linears and an activation; a map is permuted to channels-last and back (ConvNeXt)."""

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"inner": pick.width(), "residual": pick.flag()}

    def __init__(self, at: Shape, inner: int, residual: bool) -> None:
        super().__init__(at)
        self.residual = residual
        self.up, self.down = nn.Linear(at.channels, inner), nn.Linear(inner, at.channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.movedim(1, -1) if self.at.layout == "map" else x
        y = self.down(F.gelu(self.up(y)) + 0.1)
        y = y.movedim(-1, 1) if self.at.layout == "map" else y
        return x + y if self.residual else y


@block("tied_mlp")
class TiedMlp(Block):
    """``W`` up and ``W.t()`` down."""

    layouts = ("tokens",)
    columns = MappingProxyType({"weight": 1})
    columns_suffice = False

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"inner": pick.width(), "spelling": pick.of("t", "T", "transpose")}

    def __init__(self, at: Shape, inner: int, spelling: str) -> None:
        super().__init__(at)
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(inner, at.channels) / at.channels**0.5)
        self.bias = nn.Parameter(torch.zeros(inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        back = {"t": lambda: weight.t(), "T": lambda: weight.T, "transpose": lambda: weight.transpose(-1, -2)}[self.spelling]()
        return F.linear(torch.sigmoid(F.linear(x, weight, self.bias)), back)


@block("sliced_linear")
class SlicedLinear(Block):
    """A piece of a larger weight: rows, columns or both."""

    layouts = ("tokens",)
    columns = MappingProxyType({"weight": 1})

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"out": pick.number(2, 8), "rows": pick.number(0, 3), "cols": pick.number(0, 2)}

    def __init__(self, at: Shape, out: int, rows: int, cols: int) -> None:
        super().__init__(at)
        self.out = out
        self.weight = nn.Parameter(torch.randn(out + rows, at.channels + cols) / at.channels**0.5)
        self.bias = nn.Parameter(torch.zeros(out + rows))
        self.shape = at.to(channels=out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight[: self.out, : self.at.channels], self.bias[: self.out])


@block("matmul_linear")
class MatmulLinear(Block):
    """``x @ W + b`` with the weight stored input first; as an operator, an einsum or ``matmul``."""

    layouts = ("tokens",)
    columns = MappingProxyType({"weight": 0})

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"out": pick.width(), "spelling": pick.of("@", "einsum", "matmul", "tensordot")}

    def __init__(self, at: Shape, out: int, spelling: str) -> None:
        super().__init__(at)
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(at.channels, out) / at.channels**0.5)
        self.bias = nn.Parameter(torch.zeros(out))
        self.shape = at.to(channels=out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "einsum":
            return torch.einsum("btc,co->bto", x, self.weight) + self.bias
        if self.spelling == "matmul":
            return torch.matmul(x, self.weight) + self.bias
        if self.spelling == "tensordot":
            return torch.tensordot(x, self.weight, dims=1) + self.bias
        return x @ self.weight + self.bias


@block("per_head_linear")
class PerHeadLinear(Block):
    """Channels as heads x width, each head with a weight of its own: a batched matrix product over heads."""

    layouts = ("tokens",)
    columns_suffice = False  # a head is removed by its batch dimension

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 4

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"heads": pick.divisor(at.channels), "out": pick.number(1, 4)}

    def __init__(self, at: Shape, heads: int, out: int) -> None:
        super().__init__(at)
        self.heads = heads
        self.weight = nn.Parameter(torch.randn(heads, at.channels // heads, out))
        self.shape = at.to(channels=heads * out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cut = x.unflatten(-1, (self.heads, self.at.channels // self.heads))
        return torch.einsum("bthc,hco->btho", cut, self.weight).flatten(2)


@block("to_tokens")
class ToTokens(Block):
    """[batch, channels, *size] to [batch, positions, channels]."""

    layouts, resizes = ("map",), True

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return math.prod(at.size) <= 40

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"spelling": pick.of("flatten", "reshape", "permute")}

    def __init__(self, at: Shape, spelling: str) -> None:
        super().__init__(at)
        self.spelling = spelling
        self.shape = at.to(layout="tokens", size=(math.prod(at.size),))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "flatten":
            return x.flatten(2).transpose(1, 2)
        if self.spelling == "reshape":
            return x.reshape(x.shape[0], self.at.channels, -1).mT
        return x.permute(0, *range(2, x.dim()), 1).reshape(x.size(0), -1, x.size(1))


@block("to_map")
class ToMap(Block):
    """Tokens as a map of rank 1."""

    layouts, resizes = ("tokens",), True

    def __init__(self, at: Shape) -> None:
        super().__init__(at)
        self.shape = at.to(layout="map")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


@block("token_mix")
class TokenMix(Block):
    """Linears over the positions (MLP-Mixer); the hidden positions can be pruned, the channels pass."""

    layouts = ("tokens",)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"inner": pick.width()}

    def __init__(self, at: Shape, inner: int) -> None:
        super().__init__(at)
        self.up, self.down = nn.Linear(at.size[0], inner), nn.Linear(inner, at.size[0])
        self.shape = at.to(free=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.sigmoid(self.up(x.transpose(1, 2)))).transpose(1, 2)


@block("class_token")
class ClassToken(Block):
    """One more position, the same for the whole batch, and a trained offset for each position."""

    layouts, resizes = ("tokens",), True

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"spelling": pick.of("expand", "repeat", "broadcast")}

    def __init__(self, at: Shape, spelling: str) -> None:
        super().__init__(at)
        self.spelling = spelling
        self.token = nn.Parameter(torch.randn(1, 1, at.channels))
        self.position = nn.Parameter(torch.randn(1, at.size[0] + 1, at.channels) / 2)
        self.shape = at.to(size=(at.size[0] + 1,), free=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "expand":
            token = self.token.expand(x.shape[0], -1, -1)
        elif self.spelling == "repeat":
            token = self.token.repeat(x.shape[0], 1, 1)
        else:
            token = self.token + torch.zeros_like(x[:, :1])
        return torch.cat([token, x], dim=1) + self.position
