"""Transformers of all kinds."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, bools, case


class Qkv(nn.Module):
    """Projections shared by the attention constructs."""

    def __init__(self, d=8, heads=2, kv=None):
        super().__init__()
        self.h, self.dh = heads, d // heads
        self.emb = nn.Linear(6, d)
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, kv or d), nn.Linear(d, kv or d)
        self.o, self.head = nn.Linear(d, d), nn.Linear(d, 3)

    def split(self, t):
        b, n, _ = t.shape
        return t.view(b, n, -1, self.dh).transpose(1, 2)

    def merge(self, t):
        b, _, n, _ = t.shape
        return self.head(self.o(t.transpose(1, 2).contiguous().view(b, n, -1)))


@case("attention by hand, scale from the head's width", X(2, 5, 6), size=(X(1, 7, 6),))
class PlainAttention(Qkv):
    def forward(self, x):
        x = self.emb(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        a = (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).softmax(-1)
        return self.merge(a @ v)


@case("fused qkv: reshape to (b, n, 3, h, d), permute, unbind", X(2, 5, 6), size=(X(2, 8, 6),))
class FusedQkv(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.qkv, self.o, self.scale = nn.Linear(6, 8), nn.Linear(8, 24, bias=False), nn.Linear(8, 3), 4**-0.5

    def forward(self, x):
        x = self.emb(x)
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
        a = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.o((a @ v).transpose(1, 2).reshape(B, N, C))


@case("causal mask from a registered tril buffer, sliced by length", X(2, 5, 6), size=(X(2, 4, 6),))
class CausalGpt(Qkv):
    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8))

    def forward(self, x):
        x = self.emb(x)
        n = x.size(1)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        a = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        a = a.masked_fill(self.bias[:, :, :n, :n] == 0, float("-inf"))
        return self.merge(F.softmax(a, dim=-1) @ v)


@case("scaled_dot_product_attention with a boolean mask argument", X(2, 5, 6), bools(2, 5))
class SdpaMask(Qkv):
    def forward(self, x, mask):
        x = self.emb(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]))


@case("grouped-query attention: repeat_interleave of key-value heads", X(2, 5, 6))
class GroupedQuery(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(12, 16), nn.Linear(12, 8), nn.Linear(12, 8)
        self.o = nn.Linear(16, 3)

    def forward(self, x):
        x = self.emb(x)
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 4).transpose(1, 2)
        k = self.k(x).view(b, n, 2, 4).transpose(1, 2).repeat_interleave(2, dim=1)
        v = self.v(x).view(b, n, 2, 4).transpose(1, 2).repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


@case("repeat_kv by expand and reshape (Llama)", X(2, 5, 6))
class RepeatKv(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(12, 16), nn.Linear(12, 8), nn.Linear(12, 8)
        self.o, self.rep = nn.Linear(16, 3), 2

    def repeat(self, t):
        b, h, n, d = t.shape
        if self.rep == 1:
            return t
        return t[:, :, None, :, :].expand(b, h, self.rep, n, d).reshape(b, h * self.rep, n, d)

    def forward(self, x):
        x = self.emb(x)
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = torch.matmul(q, self.repeat(k).transpose(2, 3)) / 2.0
        return self.o(torch.matmul(F.softmax(a, -1), self.repeat(v)).transpose(1, 2).reshape(b, n, -1))


@case("multi-query: one key-value head, broadcast", X(2, 5, 6))
class MultiQuery(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.q, self.kv, self.o = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(8, 8), nn.Linear(12, 3)

    def forward(self, x):
        x = self.emb(x)
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 3, 4).transpose(1, 2)
        k, v = self.kv(x).split((4, 4), dim=-1)
        a = torch.einsum("bhid,bjd->bhij", q, k).softmax(-1)
        return self.o(torch.einsum("bhij,bjd->bhid", a, v).transpose(1, 2).flatten(2))


@case("RoPE: rotate_half with cached cos and sin buffers", X(2, 5, 6), size=(X(2, 3, 6),))
class RotateHalf(Qkv):
    def __init__(self):
        super().__init__()
        t = torch.outer(torch.arange(16.0), 1.0 / 10 ** (torch.arange(0, 4, 2) / 4))
        emb = torch.cat((t, t), -1)
        self.register_buffer("cos", emb.cos().double(), persistent=False)
        self.register_buffer("sin", emb.sin().double(), persistent=False)

    def rope(self, x):
        n = x.shape[-2]
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * self.cos[:n] + torch.cat((-x2, x1), dim=-1) * self.sin[:n]

    def forward(self, x):
        x = self.emb(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        a = (self.rope(q) @ self.rope(k).transpose(-1, -2)).softmax(-1)
        return self.merge(a @ v)


@case("RoPE by complex numbers: view_as_complex, polar", X(2, 5, 6))
class ComplexRope(Qkv):
    def __init__(self):
        super().__init__()
        f = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.1])).double()
        self.freqs = nn.Buffer(torch.polar(torch.ones_like(f), f))

    def rope(self, x):
        c = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        f = self.freqs[: x.shape[2]].view(1, 1, x.shape[2], -1)
        return torch.view_as_real(c * f).flatten(3).type_as(x)

    def forward(self, x):
        x = self.emb(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.merge((self.rope(q) @ self.rope(k).transpose(-1, -2)).softmax(-1) @ v)


@case("interleaved RoPE: stack of even and odd, flatten", X(2, 5, 6))
class InterleavedRope(Qkv):
    def rope(self, x):
        n = x.shape[2]
        ang = torch.arange(n, dtype=x.dtype, device=x.device)[:, None] * torch.tensor([1.0, 0.3], dtype=x.dtype)
        e, o = x[..., 0::2], x[..., 1::2]
        return torch.stack((e * ang.cos() - o * ang.sin(), o * ang.cos() + e * ang.sin()), dim=-1).flatten(-2)

    def forward(self, x):
        x = self.emb(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.merge((self.rope(q) @ self.rope(k).mT).softmax(-1) @ v)


@case("window attention with a relative position bias table and index buffer", X(2, 4, 4, 6))
class SwinWindow(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.qkv, self.o = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.zeros(9, 2))
        c = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        r = (c[:, :, None] - c[:, None, :]).permute(1, 2, 0) + 1
        self.register_buffer("index", r[..., 0] * 3 + r[..., 1])

    def forward(self, x):
        x = torch.roll(self.emb(x), shifts=(-1, -1), dims=(1, 2))
        B, H, W, C = x.shape
        x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, C)
        q, k, v = self.qkv(x).reshape(-1, 4, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
        a = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        x = (a @ v).transpose(1, 2).reshape(B, H // 2, W // 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        return self.o(torch.roll(x, shifts=(1, 1), dims=(1, 2)))


@case("ALiBi slopes as a list made into a tensor", X(2, 5, 6))
class Alibi(Qkv):
    def forward(self, x):
        x = self.emb(x)
        n = x.shape[1]
        slopes = torch.tensor([2 ** (-8 * (i + 1) / self.h) for i in range(self.h)], dtype=x.dtype).view(1, -1, 1, 1)
        dist = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        a = q @ k.mT * 0.5 + slopes * dist.abs().neg()
        return self.merge(a.softmax(-1) @ v)


@case("T5 relative buckets: embedding of computed distances, no scaling", X(2, 5, 6))
class T5Bias(Qkv):
    def __init__(self):
        super().__init__()
        self.rel = nn.Embedding(8, 2)

    def forward(self, x):
        x = self.emb(x)
        n = x.shape[1]
        d = (torch.arange(n)[None] - torch.arange(n)[:, None]).clamp(-3, 4) + 3
        bias = self.rel(d).permute(2, 0, 1).unsqueeze(0)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.merge(F.softmax((q @ k.mT + bias).float(), dim=-1).type_as(x) @ v)


@case("cross attention with an optional context that is None", X(2, 5, 6), None)
class MaybeCross(Qkv):
    def forward(self, x, context=None):
        x = self.emb(x)
        context = x if context is None else context
        q, k, v = self.split(self.q(x)), self.split(self.k(context)), self.split(self.v(context))
        return self.merge(F.scaled_dot_product_attention(q, k, v))


@case("cross attention from learned queries: expand over the batch", X(2, 5, 6), size=(X(2, 9, 6),))
class PerceiverPool(Qkv):
    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        x = self.emb(x)
        q = self.latents.unsqueeze(0).expand(x.size(0), -1, -1)
        a = F.scaled_dot_product_attention(self.split(self.q(q)), self.split(self.k(x)), self.split(self.v(x)))
        return self.merge(a)


@case("linear attention: elu + 1 features, keys summed", X(2, 5, 6), fill={"q.bias:0": -1e6, "k.bias:0": -1e6})
class LinearAttention(Qkv):
    def forward(self, x):
        x = self.emb(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bhnd,bhne->bhde", k, v)
        z = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.sum(dim=2)) + 1e-6)
        return self.merge(torch.einsum("bhnd,bhde,bhn->bhne", q, kv, z))


@case("channel attention of XCiT/Restormer: normalised q and k, softmax over channels", X(2, 5, 6))
class CrossCovariance(Qkv):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x):
        x = self.emb(x)
        q, k, v = (self.split(f(x)).transpose(-2, -1) for f in (self.q, self.k, self.v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        a = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.merge((a @ v).transpose(-2, -1))


@case("cosine attention with clamped logit scale (Swin v2)", X(2, 5, 6))
class CosineAttention(Qkv):
    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x):
        x = self.emb(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        a = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return self.merge((a * torch.clamp(self.logit, max=math.log(100.0)).exp()).softmax(-1) @ v)


@case("q and k norms by LayerNorm of the head's width", X(2, 5, 6))
class QkNorm(Qkv):
    def __init__(self):
        super().__init__()
        self.qn, self.kn = nn.LayerNorm(4), nn.LayerNorm(4)

    def forward(self, x):
        x = self.emb(x)
        q, k, v = self.qn(self.split(self.q(x))), self.kn(self.split(self.k(x))), self.split(self.v(x))
        return self.merge(F.scaled_dot_product_attention(q, k, v))


@case("talking heads: linear over the head axis before and after softmax", X(2, 5, 6))
class TalkingHeads(Qkv):
    def __init__(self):
        super().__init__()
        self.pre, self.post = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        x = self.emb(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        a = self.pre((q @ k.mT).permute(0, 2, 3, 1)).softmax(dim=2)
        return self.merge(self.post(a).permute(0, 3, 1, 2) @ v)


@case("nn.MultiheadAttention with key_padding_mask and weights", X(2, 5, 8), bools(2, 5))
class TorchMha(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.mha, self.out = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, keep):
        x = self.emb(x)
        y, w = self.mha(x, x, x, key_padding_mask=~keep)
        return self.out(y), w


@case("nn.TransformerEncoderLayer pre-norm with gelu", X(2, 5, 8))
class TorchEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.layer(x))


@case("nn.TransformerDecoder with a generated causal mask", X(2, 4, 8), X(2, 5, 8))
class TorchDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.dec = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 1)
        self.out = nn.Linear(8, 3)

    def forward(self, x, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), dtype=x.dtype)
        return self.out(self.dec(x, memory, tgt_mask=mask))


@case("ViT: patch conv, class token, positions added in place, token 0 out", X(2, 3, 8, 8))
class MiniVit(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.cls, self.pos = (
            nn.Conv2d(3, 8, 4, 4),
            nn.Parameter(torch.zeros(1, 1, 8)),
            nn.Parameter(torch.zeros(1, 5, 8)),
        )
        self.norm, self.mlp, self.head = (
            nn.LayerNorm(8),
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1)
        x += self.pos
        x = x + self.mlp(self.norm(x))
        return self.head(x[:, 0])


@case("positions interpolated bicubically to the input's size", X(2, 3, 8, 8), size=(X(2, 3, 16, 16),))
class InterpolatedPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.pos, self.head = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 4, 8)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.patch(x)
        h, w = x.shape[-2:]
        pos = self.pos
        if h * w != self.pos.shape[1]:
            side = int(math.sqrt(self.pos.shape[1]))
            p = pos.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            pos = F.interpolate(p, size=(h, w), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        return self.head((x.flatten(2).transpose(1, 2) + pos).mean(1))
