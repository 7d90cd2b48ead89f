"""First and last blocks: embeddings and outputs. They are not drawn as part of a body."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.testing.recipe import Block, Chain, Pick, Shape, Spec, block, project

OUTPUTS = 3


@block("embed")
class Embed(Block):
    """Integers to vectors, with or without positions."""

    layouts = ("tokens",)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"vocabulary": 7, "out": pick.number(2, 8), "positions": pick.flag()}

    def __init__(self, at: Shape, vocabulary: int, out: int, positions: bool) -> None:
        super().__init__(at)
        self.table = nn.Embedding(vocabulary, out)
        self.positions = nn.Embedding(at.size[0], out) if positions else None
        self.shape = at.to(channels=out, free=not positions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.table(x)
        return y if self.positions is None else y + self.positions(torch.arange(x.shape[1]))


@block("head")
class Head(Block):
    """The output: a class per image or per position, a map, or several things at once."""

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        fits = ("flat",) if math.prod(at.size) * at.channels <= 400 else ()
        if at.layout == "tokens":
            return {"how": pick.of("mean", "first", "each", "pair", *fits)}
        return {"how": pick.of("mean", "pool", "each", "pair", "dict", *fits)}

    def __init__(self, at: Shape, how: str) -> None:
        super().__init__(at)
        self.how = how
        self.flat = at.to(layout="tokens", size=(1,))
        if how == "pool":
            self.pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[at.rank - 1](2)
            self.linear = nn.Linear(at.channels * 2**at.rank, OUTPUTS)
        elif how == "flat":
            self.linear = nn.Linear(at.channels * math.prod(at.size), OUTPUTS)
        elif how in ("each", "pair", "dict"):
            self.each = project(at, OUTPUTS)
        if how not in ("pool", "flat", "each"):
            self.linear = nn.Linear(at.channels, OUTPUTS)
        self.shape = at.to(free=at.free and how != "flat")

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean([k for k in range(1, self.at.rank + 2) if k != self.at.axis])

    def forward(self, x: torch.Tensor) -> Any:
        if self.how == "mean":
            return self.linear(self.mean(x))
        if self.how == "first":
            return self.linear(x[:, 0])
        if self.how == "pool":
            return self.linear(self.pool(x).flatten(1))
        if self.how == "flat":
            return self.linear(x.reshape(x.shape[0], -1))
        if self.how == "pair":
            return self.each(x), self.linear(self.mean(x))
        if self.how == "dict":
            return {"map": self.each(x), "class": self.linear(self.mean(x))}
        return self.each(x)


@block("language")
class Language(Block):
    """A small language model: embedding, blocks, and logits, by the embedding's own weight if ``tied``."""

    layouts = ("tokens",)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        width = pick.width()
        return {"vocabulary": 7, "width": width, "body": pick.body(at.to(channels=width)), "tied": pick.flag()}

    def __init__(self, at: Shape, vocabulary: int, width: int, body: Sequence[Spec], tied: bool) -> None:
        super().__init__(at)
        self.table = nn.Embedding(vocabulary, width)
        self.chain = Chain(at.to(channels=width), body)
        self.back = nn.Linear(self.chain.shape.channels, width)
        self.logits = None if tied else nn.Linear(width, vocabulary, bias=False)
        self.columns = {"table.weight": 1} if tied else {}
        self.shape = self.chain.shape.to(channels=vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.table(x)
        y = y + self.back(self.chain(y))
        return F.linear(y, self.table.weight) if self.logits is None else self.logits(y)


@block("identity")
class Identity(Block):
    """The head of a network whose body ends with its outputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
