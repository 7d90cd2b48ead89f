"""Blocks that hold branches: residual, concat, split, gates, stacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.testing.recipe import Block, Chain, Pick, Shape, Spec, block, project


class Branch(nn.Module):
    """A chain of blocks, and a projection if it has to end with ``out`` channels and does not."""

    def __init__(self, at: Shape, body: Sequence[Spec], out: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        self.chain: Chain = Chain(at, body)
        self.shape: Shape = self.chain.shape
        self.fit: nn.Module | None = None
        if out is not None and self.shape.channels != out:
            self.fit = project(self.shape, out, bias=bias)
            self.shape = self.shape.to(channels=out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.chain(x)
        return x if self.fit is None else self.fit(x)


def freedom(at: Shape, *branches: Any) -> Shape:
    """``at``, tied to its size if any branch is."""
    return at.to(free=at.free and all(branch.shape.free for branch in branches))


@block("residual")
class Residual(Block):
    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"body": pick.body(at), "how": pick.of("+", "add_", "sub", "scaled")}

    def __init__(self, at: Shape, body: Sequence[Spec], how: str) -> None:
        super().__init__(at)
        self.how = how
        self.branch = Branch(at, body, at.channels, bias=False)
        self.gamma = nn.Parameter(torch.rand(at.per_channel)) if how == "scaled" else None
        self.shape = freedom(at, self.branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branch(x)
        if self.how == "add_":
            return (y * 1.0).add_(x)
        if self.how == "scaled":
            return x + self.gamma * y
        return x - y if self.how == "sub" else x + y


@block("projected")
class Projected(Block):
    """A residual whose shortcut is a projection to another width."""

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"body": pick.body(at), "out": pick.width(), "relu": pick.flag()}

    def __init__(self, at: Shape, body: Sequence[Spec], out: int, relu: bool) -> None:
        super().__init__(at)
        self.relu = relu
        self.branch = Branch(at, body, out)
        self.shortcut = project(at, out, bias=False)
        self.shape = freedom(at.to(channels=out), self.branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branch(x) + self.shortcut(x)
        return F.relu(y, inplace=True) if self.relu else y


@block("concat")
class Concat(Block):
    """Branches side by side; the input itself may be one of them (DenseNet)."""

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"bodies": [pick.body(at) for _ in range(pick.number(1, 2))], "dense": pick.flag()}

    def __init__(self, at: Shape, bodies: Sequence[Sequence[Spec]], dense: bool) -> None:
        super().__init__(at)
        self.dense = dense or len(bodies) == 1
        branches = [Branch(at, body) for body in bodies]
        self.branches = nn.ModuleList(branches)
        total = sum(branch.shape.channels for branch in branches) + at.channels * self.dense
        self.shape = freedom(at.to(channels=total), *branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = [branch(x) for branch in self.branches]
        return torch.cat([x, *pieces] if self.dense else pieces, dim=self.at.axis)


@block("split")
class Split(Block):
    """Uneven pieces, of which the first goes through a branch (CSP), or each takes the one before along (Res2Net)."""

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 3

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        first = pick.number(1, at.channels - 1)
        return {
            "first": first,
            "body": pick.body(at.to(channels=first)),
            "spelling": pick.of("split", "slice", "narrow"),
            "swap": pick.flag(),
        }

    def __init__(self, at: Shape, first: int, body: Sequence[Spec], spelling: str, swap: bool) -> None:
        super().__init__(at)
        self.first, self.spelling, self.swap = first, spelling, swap
        self.branch = Branch(at.to(channels=first), body)
        self.shape = freedom(at.to(channels=at.channels - first + self.branch.shape.channels), self.branch)

    def pieces(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        axis, first, rest = self.at.axis, self.first, self.at.channels - self.first
        if self.spelling == "split":
            a, b = torch.split(x, [first, rest], dim=axis)
            return a, b
        if self.spelling == "narrow":
            return x.narrow(axis, 0, first), x.narrow(axis, first, rest)
        if self.at.layout == "map":
            return x[:, :first], x[:, first:]
        return x[..., :first], x[..., -rest:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.pieces(x)
        a = self.branch(a)
        return torch.cat([b, a] if self.swap else [a, b], dim=self.at.axis)


@block("glu")
class Glu(Block):
    """A projection to twice the width, one half gating the other."""

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"out": pick.number(2, 6), "spelling": pick.of("chunk", "glu", "split", "two", "view")}

    def __init__(self, at: Shape, out: int, spelling: str) -> None:
        super().__init__(at)
        self.out, self.spelling = out, spelling
        if spelling == "two":
            self.value, self.gate = project(at, out), project(at, out)
        else:
            self.both = project(at, 2 * out)
        self.shape = at.to(channels=out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axis = self.at.axis
        if self.spelling == "two":
            return self.value(x) * torch.sigmoid(self.gate(x))
        both = self.both(x)
        if self.spelling == "glu":
            return F.glu(both, dim=axis)
        if self.spelling == "chunk":
            a, b = both.chunk(2, dim=axis)
        elif self.spelling == "split":
            a, b = both.split(self.out, dim=axis)
        else:
            cut = both.unflatten(axis, (2, self.out))
            a, b = cut.unbind(axis)
        return a * F.silu(b + 1)


@block("gate")
class Gate(Block):
    """Two branches multiplied, or the squeeze-and-excitation of the input."""

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"body": pick.body(at)}

    def __init__(self, at: Shape, body: Sequence[Spec]) -> None:
        super().__init__(at)
        self.branch = Branch(at, body, at.channels)
        self.shape = freedom(at, self.branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.branch(x))


@block("se")
class SqueezeExcitation(Block):
    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"inner": pick.width(), "linear": pick.flag()}

    def __init__(self, at: Shape, inner: int, linear: bool) -> None:
        super().__init__(at)
        self.linear = linear or at.layout == "tokens"
        if self.linear:
            self.down, self.up = nn.Linear(at.channels, inner), nn.Linear(inner, at.channels)
        else:
            self.down, self.up = project(at, inner), project(at.to(channels=inner), at.channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        around = [k for k in range(1, self.at.rank + 2) if k != self.at.axis]
        if not self.linear:
            return x * F.hardsigmoid(self.up(F.silu(self.down(x.mean(around, keepdim=True)))))
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean(around)))))
        if self.at.layout == "tokens":
            return x * gate.unsqueeze(1)
        return x * gate.view(x.shape[0], self.at.channels, *[1] * self.at.rank)


@block("stack")
class Stack(Block):
    """Branches stacked along a new dimension, which is summed, weighted or unbound again (selective kernels)."""

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {
            "bodies": [pick.body(at) for _ in range(2)],
            "out": pick.width(),
            "dim": pick.of(1, -1, 0),
            "how": pick.of("sum", "mean", "weighted", "unbind", "select", "max"),
        }

    def __init__(self, at: Shape, bodies: Sequence[Sequence[Spec]], out: int, dim: int, how: str) -> None:
        super().__init__(at)
        self.dim, self.how = dim, how
        self.branches = nn.ModuleList(Branch(at, body, out) for body in bodies)
        if how == "weighted":
            self.mix = nn.Parameter(torch.randn(len(bodies)))
        self.shape = freedom(at.to(channels=out), *self.branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stacked = torch.stack([branch(x) for branch in self.branches], dim=self.dim)
        if self.how == "sum":
            return stacked.sum(self.dim)
        if self.how == "mean":
            return stacked.mean(self.dim)
        if self.how == "max":
            return stacked.amax(self.dim)
        if self.how == "unbind":
            a, b = stacked.unbind(self.dim)
            return a * 0.5 - b
        if self.how == "select":
            return stacked.select(self.dim, 0) + stacked.select(self.dim, -1)
        return (stacked.movedim(self.dim, -1) * F.softmax(self.mix, 0)).sum(-1)


@block("in_place")
class InPlace(Block):
    """Writes a branch's result into a piece of a value."""

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 2

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"first": pick.number(1, at.channels - 1), "body": pick.body(at), "how": pick.of("=", "+=", "copy_", "zeros")}

    def __init__(self, at: Shape, first: int, body: Sequence[Spec], how: str) -> None:
        super().__init__(at)
        self.first, self.how = first, how
        self.branch = Branch(at, body, first)
        self.shape = freedom(at, self.branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        written, first = self.branch(x), self.first
        y = torch.zeros_like(x) if self.how == "zeros" else x.clone()
        if self.how == "copy_":
            y.narrow(self.at.axis, 0, first).copy_(written)
        elif self.at.layout == "map":
            if self.how == "+=":
                y[:, :first] += written
            else:
                y[:, :first] = written
        elif self.how == "+=":
            y[..., :first] += written
        else:
            y[..., :first] = written
        return y


@block("unet")
class UNet(Block):
    """Down, a body, up, and a concat with what was there before."""

    layouts = ("map",)

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return min(at.size) >= 4 and all(s % 2 == 0 for s in at.size)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        half = at.to(size=tuple(s // 2 for s in at.size))
        return {"body": pick.body(half), "up": pick.of("nearest", "linear", "repeat"), "join": pick.of("cat", "add")}

    def __init__(self, at: Shape, body: Sequence[Spec], up: str, join: str) -> None:
        super().__init__(at)
        self.up, self.join = up, join
        half = at.to(size=tuple(s // 2 for s in at.size))
        self.pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[at.rank - 1](2)
        self.branch = Branch(half, body, at.channels if join == "add" else None)
        total = at.channels if join == "add" else at.channels + self.branch.shape.channels
        self.shape = freedom(at.to(channels=total), self.branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branch(self.pool(x))
        if self.up == "repeat":
            for dim in range(2, self.at.rank + 2):
                y = y.repeat_interleave(2, dim=dim)
        elif self.up == "nearest":
            y = F.interpolate(y, scale_factor=2, mode="nearest")
        else:
            mode = ("linear", "bilinear", "trilinear")[self.at.rank - 1]
            y = F.interpolate(y, size=x.shape[2:], mode=mode, align_corners=False)
        return x + y if self.join == "add" else torch.cat((x, y), 1)
