"""Attention in the forms that users write."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .catalogue import network, tokens


class Heads(nn.Module):
    """4 heads of 4 over separate projections."""

    shared = 4

    def __init__(self) -> None:
        super().__init__()
        self.a, self.k = nn.Linear(4, 16), nn.Linear(4, 4 * self.shared)
        self.v, self.b = nn.Linear(4, 4 * self.shared), nn.Linear(16, 3)

    def cut(self, x: torch.Tensor, heads: int = 4) -> torch.Tensor:
        return x.view(x.shape[0], -1, heads, 4).transpose(1, 2)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.cut(self.a(x)), self.cut(self.k(x), self.shared), self.cut(self.v(x), self.shared)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attend(*self.project(x))
        return self.b(y.transpose(1, 2).flatten(2))


network("scaled dot product attention", "exact", tokens())(Heads)


@network("attention, values", "exact", tokens(), axis="v.weight:0")
class Values(Heads):
    pass


@network("causal attention", "exact", tokens())
class Causal(Heads):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@network("attention with a boolean mask", "exact", tokens())
class Masked(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).tril())

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


@network("attention with a bias for each head", "exact", tokens(), axis="bias:0")
class HeadBias(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4, 5, 5))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, dropout_p=0.0, scale=0.3)


@network("attention with relative positions (Swin)", "exact", tokens(4), axis="table:1")
class RelativePositions(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))
        self.register_buffer("index", (torch.arange(4)[:, None] - torch.arange(4)[None] + 3).flatten())

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        bias = self.table[self.index].view(4, 4, -1).permute(2, 0, 1).unsqueeze(0)
        return ((q @ k.mT) / 2 + bias).softmax(-1) @ v


@network("attention written out", "exact", tokens())
class Written(Heads):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / q.shape[-1] ** 0.5
        return F.dropout(scores.softmax(-1), 0.1, self.training) @ v


@network("attention by einsum", "exact", tokens())
class Einsum(Heads):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(0.5).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v)


@network("attention over batches of heads", "exact", tokens())
class BatchedHeads(Heads):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = q.shape
        q, k, v = (t.reshape(batch * heads, length, width) for t in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        return torch.bmm(weights, v).view(batch, heads, length, width)


@network("grouped queries", "exact", tokens())
class GroupedQueries(Heads):
    shared = 2

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@network("grouped queries by repetition", "exact", tokens())
class RepeatedKeys(GroupedQueries):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return (q @ k.mT * 0.5).softmax(-1) @ v


@network("grouped queries by expansion", "exact", tokens())
class ExpandedKeys(GroupedQueries):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = k.shape
        k, v = (t[:, :, None].expand(batch, heads, 2, length, width).reshape(batch, 2 * heads, length, width) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


@network("one key for all heads", "exact", tokens())
class MultiQuery(Heads):
    shared = 1

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).softmax(-1) @ v


@network("rotary positions", "exact", tokens())
class Rotary(Heads):
    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(5).float(), torch.tensor([1.0, 0.3]))
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat([-x[..., half:], x[..., :half]], -1) * self.sin

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)


@network("rotary positions in pairs", "exact", tokens())
class RotaryPairs(Rotary):
    def turned(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * self.cos + pairs * self.sin


@network("normalised queries and keys", "sound", tokens())
class NormalisedQueries(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(4), nn.LayerNorm(4)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)


class Fused(nn.Module):
    """q, k and v in one projection: 3 x heads x width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 48), nn.Linear(16, 3)

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.a(x).reshape(x.shape[0], -1, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.parts(x)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.b(y.transpose(1, 2).reshape(x.shape[0], -1, 16))


network("fused attention, 3 x heads x width (timm)", "exact", tokens())(Fused)


@network("fused attention, heads x 3 x width (GPT-NeoX)", "exact", tokens())
class FusedHeadsFirst(Fused):
    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        fused = self.a(x).view(x.shape[0], -1, 4, 12).transpose(1, 2)
        q, k, v = fused.chunk(3, -1)
        return q, k, v


@network("fused attention by chunk (GPT-2)", "exact", tokens())
class FusedChunks(Fused):
    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.a(x).chunk(3, dim=-1))
        return q, k, v


@network("fused attention by index", "exact", tokens())
class FusedIndexed(Fused):
    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        fused = self.a(x).view(x.shape[0], -1, 3, 4, 4).permute(2, 0, 3, 1, 4)
        return fused[0], fused[1], fused[2]


@network("nn.MultiheadAttention", "exact", tokens(), axis="attention.in_proj_weight:0")
class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.b = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.attention(x, x, x)[0])


@network("nn.MultiheadAttention, sequence first, with weights", "sound", tokens(), axis="attention.in_proj_weight:0")
class ModuleWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.b = nn.MultiheadAttention(4, 2, add_bias_kv=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.transpose(0, 1)
        y, weights = self.attention(x, x, x, average_attn_weights=False)
        return self.b(y).transpose(0, 1), weights


@network("nn.TransformerEncoderLayer", "exact", tokens(), axis="layer.linear1.weight:0")
class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.b = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.layer(x))


@network("linear attention", "exact", tokens())
class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.k, self.v, self.b = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = F.elu(self.a(x)) + 1, F.elu(self.k(x)) + 1
        total = q @ k.sum(1).unsqueeze(-1)
        return self.b(q @ (k.mT @ self.v(x)) / total)
