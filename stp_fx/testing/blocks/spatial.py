"""Blocks that change or mix positions: pooling, resizing, pixel shuffles, patches."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.testing.recipe import Block, Pick, Shape, block


@block("pool")
class Pool(Block):
    layouts, resizes = ("map",), True

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return min(at.size) >= 4

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"how": pick.of("max", "avg", "call")}

    def __init__(self, at: Shape, how: str) -> None:
        super().__init__(at)
        pools = {"max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), "avg": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)}
        self.pool = None if how == "call" else pools[how][at.rank - 1](2)
        self.shape = at.to(size=tuple(s // 2 for s in at.size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is None:
            return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[self.at.rank - 1](x, 2) + 0.1
        return self.pool(x)


@block("same_pool")
class SamePool(Block):
    """Pooling of stride 1 (Inception)."""

    layouts = ("map",)

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return min(at.size) >= 3  # on meta tensors, avg_pool3d forgets the padding when it compares size and kernel

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"how": pick.of("avg", "max")}

    def __init__(self, at: Shape, how: str) -> None:
        super().__init__(at)
        pools = {"max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), "avg": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)}
        self.pool = pools[how][at.rank - 1](3, stride=1, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x)


@block("resize")
class Resize(Block):
    """To a fixed size, by interpolation or adaptive pooling."""

    layouts, resizes = ("map",), True

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"size": pick.number(2, 5), "how": pick.of("avg", "max", "nearest", "linear")}

    def __init__(self, at: Shape, size: int, how: str) -> None:
        super().__init__(at)
        self.size, self.how = size, how
        adaptive = {
            "avg": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
            "max": (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        }
        self.pool = adaptive[how][at.rank - 1](size) if how in adaptive else None
        self.shape = at.to(size=(size,) * at.rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            return self.pool(x)
        if self.how == "nearest":
            return F.interpolate(x, size=[self.size] * self.at.rank)
        return F.interpolate(x, size=[self.size] * self.at.rank, mode=("linear", "bilinear", "trilinear")[self.at.rank - 1])


@block("edges")
class Edges(Block):
    """Spatial padding, and the padding cut off again."""

    layouts = ("map",)

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return min(at.size) >= 2

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"mode": pick.of("constant", "reflect", "replicate")}

    def __init__(self, at: Shape, mode: str) -> None:
        super().__init__(at)
        self.mode = mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.pad(x, [1, 1] * self.at.rank, mode=self.mode)
        return torch.sigmoid(y)[(slice(None), slice(None), *[slice(1, -1)] * self.at.rank)]


@block("pixel_shuffle")
class PixelShuffle(Block):
    """Channels to positions: 4 channels that make one channel twice as large go together."""

    layouts, ranks, resizes = ("map",), (2,), True

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels % 4 == 0 and at.channels >= 8 and max(at.size) <= 6

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"spelling": pick.of("module", "view", "call")}

    def __init__(self, at: Shape, spelling: str) -> None:
        super().__init__(at)
        self.spelling = spelling
        self.shuffle = nn.PixelShuffle(2)
        self.shape = at.to(channels=at.channels // 4, size=(2 * at.size[0], 2 * at.size[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "module":
            return self.shuffle(x)
        if self.spelling == "call":
            return F.pixel_shuffle(x, 2)
        n, c, h, w = x.shape
        return x.contiguous().view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


@block("pixel_unshuffle")
class PixelUnshuffle(Block):
    """Positions to channels: each channel becomes 4."""

    layouts, ranks, resizes = ("map",), (2,), True

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels <= 4 and all(s % 2 == 0 and s >= 4 for s in at.size)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"spelling": pick.of("module", "focus")}

    def __init__(self, at: Shape, spelling: str) -> None:
        super().__init__(at)
        self.spelling = spelling
        self.shuffle = nn.PixelUnshuffle(2)
        self.shape = at.to(channels=4 * at.channels, size=(at.size[0] // 2, at.size[1] // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "module":
            return self.shuffle(x)
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


@block("spatial_gate")
class SpatialGate(Block):
    """The mean and the maximum over the channels, convolved to a gate (CBAM)."""

    layouts = ("map",)
    columns_suffice = False

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 2

    def __init__(self, at: Shape) -> None:
        super().__init__(at)
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[at.rank - 1](2, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(seen))


@block("position_mix")
class PositionMix(Block):
    """A linear over all positions of a map, flattened and cut again; its size is fixed."""

    layouts = ("map",)

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return math.prod(at.size) <= 40

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"spelling": pick.of("flatten", "view")}

    def __init__(self, at: Shape, spelling: str) -> None:
        super().__init__(at)
        self.spelling = spelling
        self.mix = nn.Linear(math.prod(at.size), math.prod(at.size))
        self.shape = at.to(free=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "flatten":
            return x + self.mix(x.flatten(2)).unflatten(2, self.at.size)
        return x + self.mix(x.contiguous().view(x.shape[0], self.at.channels, -1)).view(x.shape)
