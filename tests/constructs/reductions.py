"""Reductions, normalisations, positions and products of activations over channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .catalogue import conv, image, maps, network, rows, tokens

maps("sum over channels", lambda y: y * y.sum(1, keepdim=True).tanh(), "exact")
maps("norm over channels", lambda y: y / (1 + y.norm(dim=1, keepdim=True)), "exact")
maps("linalg norm over channels", lambda y: y / (1 + torch.linalg.vector_norm(y, 1, 1, True)), "exact")
maps("normalize over channels", lambda y: F.normalize(y, dim=1), "exact")
maps("cumsum over channels", lambda y: y.cumsum(1), "exact")
maps("mean over channels", lambda y: y - y.mean(1, keepdim=True), "inexact")
maps("max over channels", lambda y: y - y.amax(1, keepdim=True), "inexact")
maps("max with positions over channels", lambda y: y - y.max(1, keepdim=True)[0], "pinned", "max")
maps("logsumexp over channels", lambda y: y - y.logsumexp(1, keepdim=True), "inexact")
maps("standard deviation over channels", lambda y: y / (1 + y.std(1, keepdim=True)), "inexact")
maps("softmax over channels", lambda y: y.softmax(1), "inexact")
maps("log_softmax over channels", lambda y: F.log_softmax(y, dim=1), "inexact")
maps("topk over channels", lambda y: y.topk(4, 1).values, "pinned", "topk", out=4)
maps("sort over channels", lambda y: y.sort(1)[0], "pinned", "sort")
maps("argmax over channels", lambda y: y + y.argmax(1, keepdim=True), "pinned", "argmax")
maps("argsort over channels", lambda y: y.gather(1, y.argsort(1)), "pinned", "argsort")
maps("spatial mean and max", lambda y: y + y.mean((2, 3), keepdim=True) + y.amax((2, 3), keepdim=True), "exact")
maps("softmax over positions", lambda y: y.flatten(2).softmax(2).view(y.shape), "exact")
maps("maxout over halves", lambda y: y.view(-1, 2, 4, 6, 6).amax(1), "exact", out=4)
maps("maxout over pairs", lambda y: y.unflatten(1, (4, 2)).max(2)[0], "sound", out=4)
maps("maximum of two halves", lambda y: torch.maximum(y[:, :4], y[:, 4:]), "exact", out=4)
maps("where over channels", lambda y: torch.where(y > 0.5, y, 1 - y), "exact")
maps("masked_fill", lambda y: y.masked_fill(y < 0.4, -1.0), "exact")
maps("clamp and comparisons", lambda y: y.clamp(0.3, 0.6) * (y > 0.5), "exact")
maps("times a range", lambda y: y * torch.arange(8, dtype=y.dtype).view(1, 8, 1, 1), "pinned", "")
maps("times a constant of ones", lambda y: y * torch.full((1, 8, 1, 1), 2.0, dtype=y.dtype), "exact")
maps("divided by the number of channels", lambda y: y * (y.sum(1, keepdim=True) / y.shape[1]), "exact")
maps(
    "gather with a channel index",
    lambda y: y.gather(1, torch.zeros(y.shape[0], 4, 6, 6, dtype=torch.int64)),
    "pinned",
    "gather",
    out=4,
)
maps(
    "scatter with a channel index",
    lambda y: y.scatter(1, torch.zeros(y.shape[0], 8, 6, 6, dtype=torch.int64), y),
    "pinned",
    "scatter",
)
maps("cosine similarity over channels", lambda y: y * F.cosine_similarity(y, y.cos(), dim=1).unsqueeze(1), "exact")
rows("gram matrix", lambda y: y @ y.mT, "exact", out=5)
rows("gram matrix of channels", lambda y: y @ (y.mT @ y), "exact")
rows("cdist over channels", lambda y: torch.cdist(y, y.cos()), "exact", out=5)
rows("triu over channels", lambda y: torch.triu(y), "pinned", "triu")
rows("einsum gram", lambda y: torch.einsum("btc,bsc->bts", y, y), "exact", out=5)
rows("einsum without contraction", lambda y: torch.einsum("btc,btc->btc", y, y), "exact")
rows("bmm of activations", lambda y: torch.bmm(y, y.transpose(1, 2)), "exact", out=5)
rows("outer product", lambda y: (y.unsqueeze(-1) * y.cos().unsqueeze(-2)).flatten(2), "exact", out=64)
rows("outer product by einsum", lambda y: torch.einsum("btc,btd->btcd", y, y.cos()).flatten(2), "exact", out=64)
rows("kronecker sums", lambda y: (y[..., :, None] + y[..., None, :]).sum(-1), "exact")


@network("bilinear pooling", "exact", tokens())
class BilinearPooling(nn.Module):
    """Products of all pairs of channels of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.other, self.b = nn.Linear(4, 8), nn.Linear(4, 6), nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.einsum("btc,btd->bcd", self.a(x), self.other(x)).flatten(1))


@network("nn.Bilinear", "exact", tokens())
class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.other, self.join, self.b = nn.Linear(4, 8), nn.Linear(4, 6), nn.Bilinear(8, 6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.join(self.a(x), self.other(x)).sigmoid())


@network("channels attend to channels", "inexact", tokens(), axis="k.weight:0")
class CrossCovariance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.k, self.v, self.b = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.a(x).mT @ self.k(x)).softmax(-1)
        return self.b((weights @ self.v(x).mT).mT)


@network("squeeze and excitation", "exact", image())
class SqueezeExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up, self.b = conv(3, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        gate = F.hardsigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        return self.b(y * gate)


@network("gated linear unit", "exact", tokens(), axis="a.weight:0")
class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.glu(self.a(x), -1))


@network("swiglu from one projection", "exact", tokens(), axis="a.weight:0")
class SwiGlu(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.a(x).chunk(2, dim=-1)
        return self.b(value * F.silu(gate))


class Doubled(torch.autograd.Function):
    """A forward of its own, and a backward that is not its derivative."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


maps("custom autograd function", lambda y: Doubled.apply(y), "sound")


@torch.library.custom_op("stp_fx_tests::reversed_channels", mutates_args=())
def reversed_channels(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1).clone()


@reversed_channels.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _backward(ctx, grad: torch.Tensor) -> torch.Tensor:
    return grad.flip(1)


reversed_channels.register_autograd(_backward)

maps("custom op without a rule", lambda y: torch.ops.stp_fx_tests.reversed_channels(y), "pinned", "no rule for stp_fx_tests")
