"""Names, modes, buffers, hooks, state and containers."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from .registry import X, case, conv


@case("a submodule named `code`", X(2, 4))
class NamedCode(nn.Module):
    def __init__(self):
        super().__init__()
        self.code, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.code(x)))


@case("a submodule named `graph`", X(2, 4))
class NamedGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.graph, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.graph(x)))


@case("a submodule named `meta` and a parameter named `_scale`", X(2, 4))
class NamedMeta(nn.Module):
    def __init__(self):
        super().__init__()
        self.meta, self._scale, self.out = nn.Linear(4, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.meta(x) * self._scale))


@case("ModuleDict with keys that are Python words and methods", X(2, 4))
class KeywordKeys(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"class": nn.Linear(4, 8), "lambda": nn.Linear(8, 8), "1-x": nn.Linear(8, 8)})
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        for b in self.blocks.values():
            x = F.relu(b(x))
        return self.out(x)


@case("train() override that keeps BatchNorm frozen", X(4, 3, 6, 6))
class FrozenBnByTrain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.out = conv(3, 8), nn.BatchNorm2d(8), conv(8, 3)

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x):
        return self.out(F.relu(self.bn(self.a(x))))


@case("FrozenBatchNorm: four buffers, folded in forward", X(2, 3, 6, 6))
class FrozenBn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), conv(8, 3)
        for n in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(n, torch.rand(8) + 0.5)

    def forward(self, x):
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        scale = w * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return self.out(F.relu(self.a(x) * scale + (b - self.running_mean.reshape(1, -1, 1, 1) * scale)))


@case("running mean as a buffer, assigned in training", X(4, 6))
class EmaBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.rand(8))

    def forward(self, x):
        x = self.a(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return self.out(x - self.mean)


@case("running mean updated in place under no_grad, step counter", X(4, 6))
class EmaInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.rand(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        x = self.a(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                self.steps += 1
        return self.out(x / (1 + self.mean.abs()))


@case("memory queue of MoCo: rows of a buffer written at a pointer", X(2, 6), batch=False)
class Queue(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.ptr = nn.Linear(6, 8), nn.Linear(8, 4), 0
        self.register_buffer("queue", F.normalize(torch.randn(6, 4), dim=1))

    def forward(self, x):
        z = F.normalize(self.b(F.relu(self.a(x))), dim=1)
        logits = z @ self.queue.clone().detach().t()
        if self.training:
            self.queue[0:2] = z.detach()
        return logits / 0.07


@case("forward hook that replaces the output", X(2, 6))
class HookReplaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.a.register_forward_hook(lambda m, i, o: torch.tanh(o) * 2)

    def forward(self, x):
        return self.out(self.a(x))


@case("forward pre-hook that scales the input; hook on the root", X(2, 6))
class PreHook(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.out.register_forward_pre_hook(lambda m, args: (args[0] * 0.5 + 1,))
        self.register_forward_hook(lambda m, i, o: o.clamp(min=-1))

    def forward(self, x):
        return self.out(F.relu(self.a(x)))


@case("feature extractor by hooks that write a dict of the model", X(2, 6))
class HookStores(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out, self.feats = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), {}
        self.a.register_forward_hook(self.store)

    def store(self, module, args, output):
        self.feats["a"] = output

    def forward(self, x):
        y = self.out(F.relu(self.b(self.a(x))))
        return y, self.feats["a"].sum(1)


@case("pre-hook with kwargs", X(2, 6))
class KwargHook(nn.Module):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(6, 8)

        def forward(self, x, scale=1.0):
            return self.l(x) * scale

    def __init__(self):
        super().__init__()
        self.inner, self.out = KwargHook.Inner(), nn.Linear(8, 3)
        self.inner.register_forward_pre_hook(lambda m, a, k: (a, {**k, "scale": k["scale"] * 2}), with_kwargs=True)

    def forward(self, x):
        return self.out(torch.relu(self.inner(x, scale=1.5)))


@case("losses collected in a list attribute in forward", X(2, 6))
class ListAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out, self.losses = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), []

    def forward(self, x):
        self.losses.clear()
        for layer in (self.a, self.b):
            x = torch.relu(layer(x))
            self.losses.append(x.pow(2).mean(0).sum())
        return self.out(x), sum(self.losses)


@case("cache in a dict keyed by size", X(2, 4, 6), size=(X(2, 7, 6),))
class SizeCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out, self.cache = nn.Linear(6, 8), nn.Linear(8, 3), {}

    def forward(self, x):
        n = x.shape[1]
        if n not in self.cache:
            self.cache[n] = torch.linspace(0, 1, n, dtype=torch.float64)[:, None]
        return self.out(self.a(x) * self.cache[n])


@case("a python counter of calls that changes the output", X(2, 6))
class CallCounter(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out, self.calls = nn.Linear(6, 8), nn.Linear(8, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.out(F.relu(self.a(x))) * self.calls


@case("dropout variants: functional with self.training, Dropout2d, alpha", X(2, 3, 6, 6))
class Dropouts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(8, 8), conv(8, 3)
        self.d2, self.al = nn.Dropout2d(0.3), nn.AlphaDropout(0.2)

    def forward(self, x):
        x = F.dropout(self.d2(self.a(x)), 0.4, self.training)
        return self.out(self.al(F.selu(self.b(x))))


@case(
    "Monte-Carlo dropout: always on",
    X(2, 6),
    train=False,
    reason="random in eval too: only the same seed compares",
    inexact_only=True,
)
class McDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.dropout(F.relu(self.a(x)), 0.5, training=True))


@case("tied weights: decoder is the transposed encoder", X(2, 6))
class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.bias = nn.Linear(6, 8), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return F.linear(torch.sigmoid(self.enc(x)), self.enc.weight.t(), self.bias)


@case("one block applied three times (ALBERT)", X(2, 6))
class SharedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.block, self.out = (
            nn.Linear(6, 8),
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.inp(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.out(x)


@case(
    "weight norm by parametrization",
    X(2, 3, 8),
    keep=("a.parametrizations.weight.original1:0", "b.parametrizations.weight.original1:0"),
)
class WeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Conv1d(3, 8, 3, padding=1))
        self.b, self.out = parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1)), nn.Conv1d(8, 3, 1)

    def forward(self, x):
        return self.out(F.leaky_relu(self.b(F.leaky_relu(self.a(x), 0.1)), 0.1))


@case("old weight norm: g, v and a hook", X(2, 3, 8), keep=("a.weight_v:0",))
class OldWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.utils.weight_norm(nn.Conv1d(3, 8, 3, padding=1)), nn.Conv1d(8, 3, 1)

    def forward(self, x):
        return self.out(F.leaky_relu(self.a(x), 0.1))


@case("spectral norm by parametrization", X(2, 6))
class SpectralNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).transpose(-1, -2)


@case("own parametrization: symmetric weight", X(2, 6))
class OwnParametrization(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        parametrize.register_parametrization(self.b, "weight", Symmetric())

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("weight standardisation in forward of a conv subclass", X(2, 3, 6, 6))
class WeightStandardised(nn.Module):
    class StdConv(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
            return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), WeightStandardised.StdConv(8, 8, 3, padding=1), conv(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("equalised learning rate: weight times a constant of fan-in", X(2, 6))
class EqualLr(nn.Module):
    class Lin(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight * (1 / math.sqrt(self.weight.shape[1])), self.bias)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = EqualLr.Lin(6, 8), EqualLr.Lin(8, 8), EqualLr.Lin(8, 3)

    def forward(self, x):
        return self.out(F.leaky_relu(self.b(F.leaky_relu(self.a(x)))))


@case("gradient checkpointing in training", X(2, 6))
class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x)
        x = checkpoint(self.b, x, use_reentrant=False) if self.training else self.b(x)
        return self.out(F.relu(x))


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lam):
        ctx.lam = lam
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.lam * g, None
