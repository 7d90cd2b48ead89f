"""Attention: fused, separate and grouped projections; module, kernel and spelled-out cores; channels against channels."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.testing.recipe import Block, Pick, Shape, block


@block("attention")
class Attention(Block):
    """Multi-head self-attention with ``heads`` query heads of ``width`` on ``shared`` heads of keys and values.

    ``projection``: how q, k and v are cut from their projections; ``core``: how they meet. A pruned head dimension of q and k
    is read by no weight, so the simple oracle does not reach it.
    """

    layouts = ("tokens",)
    columns_suffice = False
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        heads = pick.of(2, 1, 3, 4)
        shared = pick.divisor(heads) if heads == 4 and pick.flag() else heads
        fused = ("reshape", "unbind", "chunk") if shared == heads else ()
        return {
            "heads": heads,
            "shared": shared,
            "width": pick.number(2, 4),
            "projection": pick.of("separate", "split", *fused),
            "core": pick.of("sdpa", "softmax", "einsum"),
            "extra": pick.of("none", "residual", "causal", "rotary", "bias", "norm"),
        }

    def __init__(self, at: Shape, heads: int, shared: int, width: int, projection: str, core: str, extra: str) -> None:
        super().__init__(at)
        self.heads, self.shared, self.width = heads, shared, width
        self.projection, self.core, self.extra = projection, core, extra
        self.sizes = [heads * width, shared * width, shared * width]
        if projection == "separate":
            self.q, self.k, self.v = (nn.Linear(at.channels, size, bias=size > 4) for size in self.sizes)
        else:
            self.qkv = nn.Linear(at.channels, sum(self.sizes))
        self.out = nn.Linear(heads * width, at.channels)
        if extra == "rotary":
            angles = torch.outer(torch.arange(at.size[0]).float(), torch.rand((width + 1) // 2) + 0.5)
            self.register_buffer("cos", torch.cat([angles.cos()] * 2, 1)[:, :width])
            self.register_buffer("sin", torch.cat([angles.sin()] * 2, 1)[:, :width])
        elif extra == "bias":
            self.table = nn.Parameter(torch.randn(heads, at.size[0], at.size[0]))
        elif extra == "norm":
            self.q_norm = nn.RMSNorm(width)
        self.shape = at.to(free=at.free and extra not in ("rotary", "bias"))

    def cut(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v as [batch, heads, positions, width]."""
        b, t, width = x.shape[0], x.shape[1], self.width
        if self.projection == "separate":
            parts = [self.q(x), self.k(x), self.v(x)]
        elif self.projection == "split":
            parts = list(self.qkv(x).split(self.sizes, dim=-1))
        elif self.projection == "chunk":
            parts = list(self.qkv(x).chunk(3, dim=-1))
        elif self.projection == "reshape":
            fused = self.qkv(x).reshape(b, t, 3, self.heads, width).permute(2, 0, 3, 1, 4)
            return fused[0], fused[1], fused[2]
        else:
            q, k, v = self.qkv(x).view(b, t, self.heads, 3, width).transpose(1, 2).unbind(3)
            return q, k, v
        counts = (self.heads, self.shared, self.shared)
        q, k, v = (p.view(b, t, n, width).transpose(1, 2) for p, n in zip(parts, counts, strict=True))
        return q, k, v

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * self.cos + turned * self.sin

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.shared != self.heads:
            if self.core == "sdpa" and self.extra == "none":
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            k, v = (t.repeat_interleave(self.heads // self.shared, dim=1) for t in (k, v))
        mask = self.table if self.extra == "bias" else None
        if self.core == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.extra == "causal")
        scale = self.width**-0.5
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale if self.core == "einsum" else (q * scale) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        if self.extra == "causal":
            size = scores.shape[-1]
            future = torch.ones(size, size, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        weights = scores.softmax(dim=-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v) if self.core == "einsum" else weights @ v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.cut(x)
        if self.extra == "rotary":
            q, k = self.rotated(q), self.rotated(k)
        elif self.extra == "norm":
            q = self.q_norm(q)
        y = self.attend(q, k, v)
        y = y.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.heads * self.width)
        return x + self.out(y) if self.extra == "residual" else self.out(y)


@block("module_attention")
class ModuleAttention(Block):
    """``nn.MultiheadAttention``, also with keys and values of another width."""

    layouts = ("tokens",)
    columns_suffice = False

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 2

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"heads": pick.of(1, pick.divisor(at.channels)), "bias": pick.flag(), "cross": pick.flag()}

    def __init__(self, at: Shape, heads: int, bias: bool, cross: bool) -> None:
        super().__init__(at)
        self.cross = nn.Linear(at.channels, 5) if cross else None
        inner = 5 if cross else None
        self.attention = nn.MultiheadAttention(at.channels, heads, bias=bias, batch_first=True, kdim=inner, vdim=inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = x if self.cross is None else torch.tanh(self.cross(x))
        return self.attention(x, memory, memory, need_weights=False)[0]


@block("encoder_layer")
class EncoderLayer(Block):
    """``nn.TransformerEncoderLayer``: its residual stream is normalised, its inner width is not."""

    layouts = ("tokens",)
    columns_suffice = False

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 2

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"heads": pick.of(1, pick.divisor(at.channels)), "inner": pick.width(), "first": pick.flag()}

    def __init__(self, at: Shape, heads: int, inner: int, first: bool) -> None:
        super().__init__(at)
        self.layer = nn.TransformerEncoderLayer(at.channels, heads, inner, dropout=0.1, batch_first=True, norm_first=first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@block("linear_attention")
class LinearAttention(Block):
    """Keys against values first: channels meet channels, and no weight reads them."""

    layouts = ("tokens",)
    columns_suffice = False

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"key": pick.width(), "value": pick.width(), "softmax": pick.flag()}

    def __init__(self, at: Shape, key: int, value: int, softmax: bool) -> None:
        super().__init__(at)
        self.softmax = softmax
        self.q, self.k = nn.Linear(at.channels, key), nn.Linear(at.channels, key)
        self.v, self.out = nn.Linear(at.channels, value), nn.Linear(value, at.channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = torch.sigmoid(self.q(x)), torch.sigmoid(self.k(x))
        if self.softmax:
            k = k.softmax(dim=1)
        return self.out(torch.bmm(q, k.mT @ self.v(x)))


@block("non_local")
class NonLocal(Block):
    """Positions of a map attend to each other; queries and keys of another width than values."""

    layouts = ("map",)
    columns_suffice = False

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return math.prod(at.size) <= 40

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"key": pick.width(), "value": pick.width()}

    def __init__(self, at: Shape, key: int, value: int) -> None:
        super().__init__(at)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[at.rank - 1]
        self.q, self.k = conv(at.channels, key, 1), conv(at.channels, key, 1, bias=False)
        self.v, self.out = conv(at.channels, value, 1), conv(value, at.channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
        weights = torch.einsum("ncq,nck->nqk", q, k).softmax(-1)
        y = torch.einsum("nqk,nck->ncq", weights, v)
        return x + self.out(y.reshape(x.shape[0], -1, *x.shape[2:]))


@block("channel_attention")
class ChannelAttention(Block):
    """Channels attend to channels (XCiT, CBAM's cousins): a softmax runs over them."""

    layouts = ("tokens",)
    columns_suffice = False

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"inner": pick.number(3, 8)}

    def __init__(self, at: Shape, inner: int) -> None:
        super().__init__(at)
        self.qkv, self.out = nn.Linear(at.channels, 3 * inner), nn.Linear(inner, at.channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (F.normalize(q, dim=1).mT @ F.normalize(k, dim=1)).softmax(-1)
        return self.out((weights @ v.mT).mT)
