"""Constructs of several kinds that the other files had no room for."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .constructs_d_modes import _Reverse
from .registry import P, X, bools, case, conv, ints


@case("ActNorm: data-dependent init in the first training call, a buffer flag", X(4, 6))
class ActNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.log_scale, self.bias = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("initialized", torch.tensor(True))

    def forward(self, x):
        x = self.a(x)
        if not self.initialized:
            self.bias.data = -x.mean(0)
            self.initialized.fill_(True)
        return self.out((x + self.bias) * self.log_scale.exp()), self.log_scale.sum()


@case("invertible 1x1 convolution: slogdet of a weight", X(2, 6, 4, 4))
class Glow1x1(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.out = conv(6, 6), nn.Parameter(torch.eye(6)), conv(6, 3)

    def forward(self, x):
        x = self.a(x)
        h, w = x.shape[2:]
        return self.out(F.conv2d(x, self.w.view(6, 6, 1, 1))), torch.slogdet(self.w)[1] * h * w


@case("sinusoidal table sliced by length, dropout, scale by sqrt of width", ints(9, 2, 5), size=(ints(9, 2, 3),))
class SinusoidalLm(nn.Module):
    def __init__(self):
        super().__init__()
        self.d, self.emb, self.drop, self.out = 8, nn.Embedding(9, 8), nn.Dropout(0.1), nn.Linear(8, 9)
        pe = torch.zeros(16, 8)
        pe[:, 0::2] = torch.sin(torch.arange(16.0)[:, None] * torch.exp(torch.arange(0, 8, 2) * (-1.0)))
        pe[:, 1::2] = torch.cos(torch.arange(16.0)[:, None] * torch.exp(torch.arange(0, 8, 2) * (-1.0)))
        self.register_buffer("pe", pe.unsqueeze(0))

    def forward(self, ids):
        x = self.emb(ids) * math.sqrt(self.d)
        x = self.drop(x + self.pe[:, : x.size(1)].requires_grad_(False))
        return F.log_softmax(self.out(x), dim=-1)


@case("Fourier mixing (FNet): real part of fft over sequence and width", X(2, 4, 6))
class FNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.norm, self.out = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.emb(x)
        return self.out(self.norm(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real))


@case("attention pooling: softmax over positions of a scalar score, masked by lengths", X(2, 5, 6), P(2, 5))
class AttentionPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.s, self.out = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x, w):
        x = torch.tanh(self.a(x))
        a = self.s(x).squeeze(-1) + w.log()
        return self.out(torch.bmm(a.softmax(1).unsqueeze(1), x).squeeze(1))


@case("gradient reversal by a custom autograd.Function", X(2, 6))
class GradReverse(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out, self.dom = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.out(x), self.dom(_Reverse.apply(x, 0.5))


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


@case("dataclass output with a None field", X(2, 6))
class DataclassOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return Output(logits=self.out(F.relu(self.a(x))))


class Pair(NamedTuple):
    y: torch.Tensor
    z: torch.Tensor


@case("named tuple and OrderedDict between modules", X(2, 6))
class NamedOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def inner(self, x):
        return OrderedDict(first=Pair(self.a(x), self.b(x)), second=x)

    def forward(self, x):
        d = self.inner(x)
        return Pair(self.out(d["first"].y * d["first"].z), d["second"].sum(-1))


@case("factorised embeddings, token types and positions from a buffer", ints(9, 2, 5), size=(ints(9, 3, 4),))
class BertEmbeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.p, self.t, self.proj = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Embedding(2, 4), nn.Linear(4, 8)
        self.ln, self.out = nn.LayerNorm(8), nn.Linear(8, 3)
        self.register_buffer("position_ids", torch.arange(8).expand((1, -1)), persistent=False)

    def forward(self, ids):
        n = ids.size()[-1]
        t = torch.zeros(ids.size(), dtype=torch.long)
        x = self.w(ids) + self.p(self.position_ids[:, :n]) + self.t(t)
        return self.out(self.ln(self.proj(x)))


@case("quasi-recurrent fo-pool and highway", X(2, 4, 6), P(2, 1))
class Highway(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.h, self.t, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, temperature):
        x = self.e(x)
        t = torch.sigmoid(self.t(x) / temperature.unsqueeze(1))
        return self.out(t * F.relu(self.h(x)) + (1.0 - t) * x)


@case("padding mask with flags of an input", X(2, 5, 6), bools(2, 5))
class MaskedMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, keep):
        k = keep.unsqueeze(-1).expand_as(y := F.relu(self.a(x))).to(y.dtype)
        return self.out((y * k).sum(1) / k.sum(1).clamp(min=1e-9))


@case("BN without running statistics; F.batch_norm in forward", X(4, 3, 5, 5))
class BnFunctional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b, self.out = conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False), conv(8, 6), conv(6, 3)
        self.g = nn.Parameter(torch.ones(6))
        self.register_buffer("m", torch.rand(6))
        self.register_buffer("v", torch.rand(6) + 0.5)

    def forward(self, x):
        x = self.b(F.relu(self.bn(self.a(x))))
        return self.out(F.batch_norm(x, self.m, self.v, self.g, None, self.training, 0.1))


@case("split BatchNorm: halves of the batch through different norms in training", X(4, 3, 5, 5), batch=False)
class SplitBn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.aux, self.out = conv(3, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8), conv(8, 3)

    def forward(self, x):
        x = self.a(x)
        if self.training:
            s = x.shape[0] // 2
            a, b = x.split(s)
            x = torch.cat([self.bn(a), self.aux(b)], dim=0)
        else:
            x = self.bn(x)
        return self.out(F.relu(x))


@case("mask and count by inputs, weighted average of embeddings", X(2, 4, 6), bools(2, 4), P(2, 4))
class WeightedAverage(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, m, w):
        w = torch.where(m, w, torch.zeros_like(w))
        return self.out(torch.einsum("bn,bnd->bd", w / w.sum(1, keepdim=True), F.relu(self.a(x))))


@case("class-conditional BatchNorm: embedding of scales chunked", X(4, 3, 5, 5), ints(3, 4))
class ConditionalBn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.e, self.out = conv(3, 8), nn.BatchNorm2d(8, affine=False), nn.Embedding(3, 16), conv(8, 3)

    def forward(self, x, y):
        g, b = self.e(y).chunk(2, 1)
        x = self.bn(self.a(x))
        return self.out(F.relu(g.view(-1, 8, 1, 1) * x + b.view(-1, 8, 1, 1)))


@case("projection discriminator: embedding times features summed", X(2, 3, 5, 5), ints(3, 2))
class ProjectionD(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.l, self.e = conv(3, 8), conv(8, 6), nn.Linear(6, 1), nn.Embedding(3, 6)

    def forward(self, x, y):
        h = torch.sum(F.relu(self.b(F.relu(self.a(x)))), dim=(2, 3))
        return self.l(h) + torch.sum(self.e(y) * h, dim=1, keepdim=True)
