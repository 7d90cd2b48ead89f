"""Random pre-norm transformers: what a change of basis has to cope with, drawn from a seed."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

TOKENS = 7


class WrittenNorm(nn.Module):
    """RMSNorm as language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(dtype)


def norm_of(kind: str, width: int) -> nn.Module:
    made = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "written": WrittenNorm}
    return nn.LayerNorm(width, elementwise_affine=False) if kind == "plain" else made[kind](width)


class Block(nn.Module):
    """Attention and MLP, in turn or side by side, with options of real networks."""

    def __init__(self, draw: random.Random, kind: str, width: int) -> None:
        super().__init__()
        heads, inner = draw.choice([1, 2, 4]), draw.choice([8, 20])
        self.heads, self.parallel, self.gated = heads, draw.random() < 0.3, draw.random() < 0.4
        self.norm1, self.norm2 = norm_of(kind, width), norm_of(kind, width)
        bias = draw.random() < 0.6
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.up, self.down = nn.Linear(width, inner * (2 if self.gated else 1), bias=bias), nn.Linear(inner, width, bias=bias)
        self.scale = nn.Parameter(torch.ones(width)) if draw.random() < 0.4 else None
        self.drop = nn.Dropout(0.1) if draw.random() < 0.5 else nn.Identity()

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))
        return self.drop(y if self.scale is None else y * self.scale)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            x = F.silu(gate) * x
        return self.drop(self.down(F.gelu(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.parallel:
            y = self.norm1(x)
            return x + self.attend(y) + self.mlp(y)
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PreNorm(nn.Module):
    """Tokens or patches, blocks, a final norm and a head; ``draw`` decides all else."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        kind, width = draw.choice(["layer", "layer", "rms", "written", "plain"]), draw.choice([8, 12, 16])
        self.kind, self.images = kind, draw.random() < 0.5
        self.into: Any = nn.Conv2d(3, width, 2, 2) if self.images else nn.Embedding(11, width)
        self.token = nn.Parameter(torch.randn(1, 1, width)) if draw.random() < 0.5 else None
        positions = (9 if self.images else TOKENS) + (self.token is not None)
        self.position = nn.Parameter(torch.randn(1, positions, width)) if draw.random() < 0.7 else None
        self.blocks = nn.Sequential(*[Block(draw, kind, width) for _ in range(draw.choice([1, 2]))])
        self.norm = norm_of(kind, width)
        self.pool = draw.choice(["mean", "first", "all"])
        self.head = nn.Linear(width, 11, bias=draw.random() < 0.5)
        if not self.images and draw.random() < 0.4:
            self.head.weight = self.into.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        self.double().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        x = x.flatten(2).transpose(1, 2) if self.images else x
        x = x if self.token is None else torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = self.norm(self.blocks(x if self.position is None else x + self.position))
        x = x.mean(1) if self.pool == "mean" else x[:, 0] if self.pool == "first" else x
        return self.head(x)

    def example(self, rows: int = 2, seed: int = 0) -> torch.Tensor:
        draws = torch.Generator().manual_seed(seed)
        if self.images:
            return torch.randn(rows, 3, 6, 6, generator=draws, dtype=torch.float64)
        return torch.randint(0, 11, (rows, TOKENS), generator=draws)
