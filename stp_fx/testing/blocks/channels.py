"""Blocks that move, cut, repeat or add up channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.testing.recipe import Block, Pick, Shape, block


@block("flip")
class Flip(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flip(x, [self.at.axis])


@block("roll")
class Roll(Block):
    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"shift": pick.number(-at.channels, 2 * at.channels)}

    def __init__(self, at: Shape, shift: int) -> None:
        super().__init__(at)
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.roll(x, self.shift, dims=self.at.axis)


@block("reorder")
class Reorder(Block):
    """A constant index over channels, which may drop or repeat some: a buffer, or a list in the code."""

    index: torch.Tensor

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        index = pick.order(at.channels)
        how = pick.of("all", "some", "twice")
        index = index[: max(1, at.channels - 1)] if how == "some" else [*index, index[0]] if how == "twice" else index
        return {"index": index, "spelling": pick.of("index_select", "buffer", "list")}

    def __init__(self, at: Shape, index: Sequence[int], spelling: str) -> None:
        super().__init__(at)
        self.spelling, self.order = spelling, list(index)
        self.register_buffer("index", torch.tensor(list(index)) if spelling != "list" else None)
        self.shape = at.to(channels=len(index))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "index_select":
            return x.index_select(self.at.axis, self.index)
        index: Any = self.order if self.spelling == "list" else self.index
        return x[:, index] if self.at.layout == "map" else x[:, :, index]


@block("slice")
class Slice(Block):
    """A part of the channels goes on; a step takes every second."""

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 3

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        start = pick.number(0, at.channels - 2)
        return {"start": start, "stop": pick.number(start + 1, at.channels), "step": pick.of(1, 1, 2)}

    def __init__(self, at: Shape, start: int, stop: int, step: int) -> None:
        super().__init__(at)
        self.start, self.stop, self.step = start, stop, step
        self.shape = at.to(channels=len(range(start, stop, step)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.at.layout == "map":
            return x[:, self.start : self.stop : self.step]
        return x[..., self.start : self.stop : self.step]


@block("chunks")
class Chunks(Block):
    """Chunks (the last may be shorter), joined again in reverse."""

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 2

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"count": pick.of(2, 3), "spelling": pick.of("chunk", "tensor_split")}

    def __init__(self, at: Shape, count: int, spelling: str) -> None:
        super().__init__(at)
        self.count, self.spelling = count, spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = getattr(torch, self.spelling)(x, self.count, dim=self.at.axis)
        return torch.cat(pieces[::-1], dim=self.at.axis)


@block("pad")
class Pad(Block):
    """Channels of zeros (or ones) before and behind; a negative amount cuts."""

    makes_channels = True

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return 2 <= at.channels <= 10

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {
            "left": pick.number(-1, 2),
            "right": pick.number(0, 3),
            "value": pick.of(0.0, 1.0),
            "spelling": pick.of("pad", "cat"),
        }

    def __init__(self, at: Shape, left: int, right: int, value: float, spelling: str) -> None:
        super().__init__(at)
        self.left, self.right, self.value, self.spelling = left, right, value, spelling
        if spelling == "cat":
            self.left = max(left, 0)
        self.shape = at.to(channels=at.channels + self.left + right)

    def extra(self, x: torch.Tensor, amount: int) -> torch.Tensor:
        """New channels, all ``value``."""
        if self.at.layout == "map":
            return x.new_full((x.shape[0], amount, *x.shape[2:]), self.value)
        return x.new_full((x.shape[0], x.shape[1], amount), self.value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "pad":
            behind = 2 * self.at.rank if self.at.layout == "map" else 0
            return F.pad(x, [0] * behind + [self.left, self.right], value=self.value)
        pieces = [self.extra(x, self.left)] if self.left else []
        pieces += [x]
        pieces += [self.extra(x, self.right)] if self.right else []
        return torch.cat(pieces, self.at.axis)


@block("shuffle")
class Shuffle(Block):
    """Channel shuffle: spelled out with views, or as a call."""

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 4

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"groups": pick.divisor(at.channels), "spelling": pick.of("view", "shape", "module")}

    def __init__(self, at: Shape, groups: int, spelling: str) -> None:
        super().__init__(at)
        self.groups, self.spelling = groups, spelling
        if spelling == "module" and at.layout == "map" and at.rank == 2:
            self.shuffle = nn.ChannelShuffle(groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.at.layout == "tokens":
            return x.unflatten(2, (self.groups, -1)).transpose(2, 3).flatten(2)
        if self.spelling == "module" and self.at.rank == 2:
            return self.shuffle(x)
        if self.spelling == "shape":
            batch, channels, *size = x.shape
            x = x.contiguous().view(batch, self.groups, channels // self.groups, *size).transpose(1, 2).contiguous()
            return x.view(batch, -1, *size)
        inner = self.at.channels // self.groups
        x = x.reshape(x.shape[0], self.groups, inner, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(x.shape[0], self.at.channels, *x.shape[3:])


@block("repeat")
class Repeat(Block):
    """Every channel twice: interleaved, tiled or broadcast."""

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels <= 6

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"spelling": pick.of("cat", "repeat", "repeat_interleave", "expand", "tile")}

    def __init__(self, at: Shape, spelling: str) -> None:
        super().__init__(at)
        self.spelling = spelling
        self.shape = at.to(channels=2 * at.channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axis = self.at.axis
        if self.spelling == "cat":
            return torch.cat([x, x], axis)
        if self.spelling == "repeat_interleave":
            return x.repeat_interleave(2, dim=axis)
        if self.spelling == "expand":
            sizes = [-1] * (x.dim() + 1)
            sizes[axis + 1] = 2
            return x.unsqueeze(axis + 1).expand(sizes).flatten(axis, axis + 1)
        times = [1, 2, *[1] * self.at.rank] if self.at.layout == "map" else [1, 1, 2]
        return torch.tile(x, times) if self.spelling == "tile" else x.repeat(times)


@block("sums")
class Sums(Block):
    """Something summed or averaged over all channels gates each of them: the channels are read by no weight."""

    columns_suffice = False

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"how": pick.of("sum", "norm", "cumsum", "mean", "max", "softmax", "std", "normalize")}

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 3

    def __init__(self, at: Shape, how: str) -> None:
        super().__init__(at)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axis = self.at.axis
        if self.how == "softmax":
            return x.softmax(axis) * 3
        if self.how == "cumsum":
            return x.cumsum(axis)
        if self.how == "normalize":
            return F.normalize(x, dim=axis)
        if self.how == "max":
            return x * torch.sigmoid(x.amax(axis, keepdim=True))
        if self.how == "std":
            return x / (0.5 + x.std(axis, correction=0, keepdim=True))
        if self.how == "norm":
            return x / (0.5 + x.norm(dim=axis, keepdim=True))
        total = x.sum(axis, keepdim=True) if self.how == "sum" else x.mean(axis, keepdim=True)
        return x * torch.sigmoid(total)


@block("pick_one")
class PickOne(Block):
    """One channel, taken by number, gates all others: it cannot go."""

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"which": pick.number(-1, at.channels - 1), "spelling": pick.of("slice", "select", "index")}

    def __init__(self, at: Shape, which: int, spelling: str) -> None:
        super().__init__(at)
        self.which, self.spelling = which, spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axis, which = self.at.axis, self.which
        if self.spelling == "slice":
            start = which % self.at.channels
            one = x[:, start : start + 1] if self.at.layout == "map" else x[..., start : start + 1]
        elif self.spelling == "select":
            one = x.select(axis, which).unsqueeze(axis)
        else:
            one = (x[:, which] if self.at.layout == "map" else x[..., which]).unsqueeze(axis)
        return x * torch.sigmoid(one)


@block("maxout")
class Maxout(Block):
    """The larger of each pair of channels."""

    columns_suffice = False

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels % 2 == 0 and at.channels >= 4

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"inner": pick.flag()}

    def __init__(self, at: Shape, inner: bool) -> None:
        super().__init__(at)
        self.inner = inner
        self.shape = at.to(channels=at.channels // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axis, half = self.at.axis, self.at.channels // 2
        if self.inner:
            return x.unflatten(axis, (half, 2)).amax(axis + 1)
        return x.unflatten(axis, (2, half)).amax(axis)
