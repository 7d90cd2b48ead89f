"""Cats, stacks, pieces, permutations and paddings of channels."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from . import catalogue
from .catalogue import conv

maps, rows, network = (partial(each, columns=True) for each in (catalogue.maps, catalogue.rows, catalogue.network))


def in_place_slice(y: torch.Tensor) -> torch.Tensor:
    z = y.clone()
    z[:, :3] = y[:, 5:]
    return z


def in_place_scaled(y: torch.Tensor) -> torch.Tensor:
    z = y * 1.0
    z[:, 4:] *= 2
    return z


def written_into_zeros(y: torch.Tensor) -> torch.Tensor:
    z = torch.zeros(y.shape[0], 12, y.shape[2], y.shape[3], dtype=y.dtype)
    z[:, :8] = y
    return z


def two_ends(y: torch.Tensor) -> torch.Tensor:
    first, *_, last = y.split(2, 1)
    return torch.cat([first, last], 1)


maps("cat with itself", lambda y: torch.cat([y, y.cos()], 1), "exact", out=16)
maps("cat with zeros", lambda y: torch.cat([y, y.new_zeros(y.shape[0], 3, *y.shape[2:])], 1), "exact", out=11)
maps("concat alias", lambda y: torch.concat((y[:, 4:], y[:, :4]), dim=1), "exact")
maps("hstack", lambda y: torch.hstack([y, y]), "exact", out=16)
maps("stack and sum", lambda y: torch.stack([y, y.cos()]).sum(0), "exact")
maps("stack on the channels' place", lambda y: torch.stack([y, y.cos()], 1).flatten(1, 2), "exact", out=16)
maps("stack behind the channels", lambda y: torch.stack([y, y.cos()], 2).flatten(1, 2), "exact", out=16)
maps("stack and unbind", lambda y: torch.stack([y, y.cos()], -1).unbind(-1)[1], "exact")
maps("unbind channels", lambda y: torch.stack(y.unbind(1)[:4], 1), "pinned", "unbind", out=4)
maps("split evenly", lambda y: torch.cat(y.split(4, dim=1)[::-1], 1), "exact")
maps("split with a shorter rest", lambda y: torch.cat(y.split(3, dim=1)[::-1], 1), "exact")
maps("split unevenly", lambda y: torch.cat(torch.split(y, [1, 5, 2], 1)[1:], 1), "exact", out=7)
maps("split, two ends", two_ends, "exact", out=4)
maps("chunk", lambda y: y.chunk(2, 1)[0] * y.chunk(2, 1)[1], "exact", out=4)
maps("chunk with a shorter rest", lambda y: torch.cat(y.chunk(3, 1)[::-1], 1), "exact")
maps("tensor_split", lambda y: torch.cat(torch.tensor_split(y, 3, dim=1)[::-1], 1), "exact")
maps("slice", lambda y: y[:, 2:7], "exact", out=5)
maps("slice from the end", lambda y: y[:, -5:-1], "exact", out=4)
maps("slice with a step", lambda y: y[:, 1::2], "sound", out=4)
maps("slice with a step, added to another", lambda y: y[:, 1::2] + y[:, 4:], "sound", out=4)
maps("slice in many dimensions", lambda y: y[:, 2:, ::2, 1:-1], "exact", out=6)
maps("slice with an ellipsis", lambda y: y[..., :3, :], "exact")
maps("slice by None", lambda y: y[:, :, None, 2].unsqueeze(-1)[:, :, 0], "exact")
maps("narrow", lambda y: y.narrow(1, 3, 4), "exact", out=4)
maps("select a channel", lambda y: y * y[:, 2].unsqueeze(1), "exact", "select")
maps("select the last channel", lambda y: y * torch.select(y, 1, -1)[:, None], "exact", "select")
maps("one channel as a slice", lambda y: y * y[:, 3:4], "exact", "only position")
maps("select a position", lambda y: y + y[:, :, 0:1, 0:1] + y.select(2, 1).unsqueeze(2), "exact")
maps("list index", lambda y: y[:, [0, 2, 4]], "exact", out=3)
maps("list index with repeats", lambda y: y[:, [7, 7, 0, -1, 2]], "exact", out=5)
maps("flip", lambda y: y.flip(1), "exact")
maps("flip of everything", lambda y: torch.flip(y, (1, 2, 3)), "exact")
maps("roll", lambda y: y.roll(3, 1), "exact")
maps("roll backwards in two dimensions", lambda y: torch.roll(y, (-3, 1), (1, 2)), "exact")
maps("roll without dims", lambda y: y.roll(3), "pinned", "roll")
maps("pad channels", lambda y: F.pad(y, (0, 0, 0, 0, 1, 3)), "exact", out=12)
maps("pad channels with ones", lambda y: F.pad(y, (1, 1, 0, 0, 2, 0), value=1.0), "exact", out=10)
maps("pad by a negative amount", lambda y: F.pad(y, (0, 0, 0, 0, -2, 1)), "exact", out=7)
maps("repeat", lambda y: y.repeat(1, 2, 1, 1), "exact", out=16)
maps("repeat_interleave", lambda y: y.repeat_interleave(2, 1), "exact", out=16)
maps("tile", lambda y: torch.tile(y, (1, 2, 1, 1)), "exact", out=16)
catalogue.maps("expand a single channel", lambda y: y.sum(1, keepdim=True).expand(-1, 4, -1, -1), "exact", out=4)
maps("expand and flatten", lambda y: y.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2), "exact", out=16)
maps("in-place slice", in_place_slice, "exact")
maps("in-place product on a slice", in_place_scaled, "exact")
maps("written into zeros", written_into_zeros, "exact", out=12)
maps("in-place relu and add", lambda y: F.relu((y - 0.5), inplace=True).mul(2).add_(y), "exact")
maps("channel shuffle, views", lambda y: y.view(y.size(0), 2, 4, 6, 6).transpose(1, 2).reshape(y.size(0), 8, 6, 6), "exact")
maps("pixel shuffle", lambda y: F.avg_pool2d(F.pixel_shuffle(y, 2), 2), "exact", out=2)
maps("pixel unshuffle", lambda y: F.pixel_unshuffle(y, 2), "exact", out=32)
rows("cat of tokens", lambda y: torch.cat([y, y[:, :1]], 1), "exact")
rows("cat of channels, last dim", lambda y: torch.cat([y, y.cos()], -1), "exact", out=16)


class Shuffled(nn.ChannelShuffle):
    def __init__(self) -> None:
        super().__init__(2)


maps("channel shuffle module", Shuffled, "exact")


@network("batch norm after a cat", "exact")
class NormAfterCat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.other, self.norm, self.b = conv(3, 8), conv(3, 5), nn.BatchNorm2d(13), conv(13, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.norm(torch.cat([self.a(x), self.other(x)], 1))))


@network("dense connections", "exact")
class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.second, self.third, self.end = conv(3, 8), conv(8, 4), conv(12, 4), conv(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y = torch.cat([y, self.second(y).sigmoid()], 1)
        return self.end(torch.cat([y, self.third(y).sigmoid()], 1))


@network("residual with a parameter-free shortcut (ResNet option A)", "exact")
class OptionA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = conv(3, 4), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.norm, self.end = nn.BatchNorm2d(8), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x).sigmoid()
        shortcut = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.end(F.relu(self.norm(self.a(y)) + shortcut))


@network("constant index buffer", "exact")
class IndexBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(6, 3)
        self.register_buffer("order", torch.tensor([7, 1, 0, 4, 4, 2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)[:, self.order])


@network("index_select by a buffer", "exact")
class IndexSelect(IndexBuffer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.index_select(self.a(x), 1, self.order))


class BooleanMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(5, 6), conv(6, 3)
        self.register_buffer("mask", torch.tensor([True, False, True, True, False, True, False, True]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)[:, self.mask]))
