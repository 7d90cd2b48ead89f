"""More of what forward does besides computing: parameters written, aliases, contexts, numbers that leave the graph."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, bools, case, conv, ints


class Two(nn.Module):
    """Two linear layers for the subclasses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)


@case("momentum encoder: param_k.mul_().add_() under no_grad", X(2, 6))
class MomentumEncoder(Two):
    def __init__(self):
        super().__init__()
        self.k = nn.Linear(6, 8)
        for p in self.k.parameters():
            p.requires_grad = False

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.k.weight.mul_(0.9).add_(self.a.weight, alpha=0.1)
        q = F.relu(self.a(x))
        with torch.no_grad():
            k = F.relu(self.k(x))
        return self.out(q), (self.b(q) * k).sum(-1)


@case("max-norm constraint: weight.data renormed in every forward (EEGNet)", X(2, 6))
class MaxNorm(nn.Module):
    class Lin(nn.Linear):
        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1)
            return super().forward(x)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), MaxNorm.Lin(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.elu(self.b(F.elu(self.a(x)))))


@case("hidden sizes leave as python numbers in a dict", X(2, 3, 6, 6))
class SizesOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8, stride=2), conv(8, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        return {"out": self.out(y), "stride": x.shape[-1] // y.shape[-1], "spatial": tuple(y.shape[-2:])}


@case("the number of channels as an output", X(2, 3, 6, 6))
class ChannelsOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), conv(8, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.out(y), y.size(1)


@case("the channels' number in arithmetic on the output", X(2, 6))
class ChannelsInArithmetic(Two):
    def forward(self, x):
        y = F.relu(self.a(x))
        z = F.relu(self.b(y))
        return self.out(z) / y.shape[1] + len(z[0]) * 0.01 + z[0].numel() * 0.01


@case("python state kept in a list that grows: cache of keys", X(2, 1, 6), batch=False)
class GrowingCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.out, self.cache = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3), []

    def forward(self, x):
        self.cache.append(self.k(x))
        k = torch.cat(self.cache, 1)
        return self.out((self.q(x) @ k.mT).softmax(-1) @ k)


@case("key-value cache buffers written at a position", X(2, 2, 6), batch=False)
class BufferCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("cache", torch.rand(2, 4, 8))

    def forward(self, x):
        with torch.no_grad():
            self.cache[:, 1:3] = self.k(x)
        return self.out((self.q(x) @ self.cache.mT).softmax(-1) @ self.cache)


@case("cache argument and new cache returned (transformers)", X(2, 1, 6), ((X(2, 3, 8), X(2, 3, 8)),))
class PastKeyValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, past=None, use_cache=True):
        k, v = self.k(x), self.v(x)
        if past is not None:
            k, v = torch.cat((past[0][0], k), 1), torch.cat((past[0][1], v), 1)
        y = self.out(F.scaled_dot_product_attention(self.q(x), k, v))
        return (y, ((k, v),)) if use_cache else y


@case("forward hook with kwargs and one that returns None; always_call", X(2, 6))
class ManyHooks(Two):
    def __init__(self):
        super().__init__()
        self.a.register_forward_hook(lambda m, a, k, o: o * 2, with_kwargs=True)
        self.b.register_forward_hook(lambda m, i, o: None, always_call=True)
        self.b.register_forward_pre_hook(lambda m, i: i[0].clamp(min=-1))

    def forward(self, x):
        return self.out(F.relu(self.b(self.a(x))))


@case("hooks on a container and on the root's input", X(2, 6))
class ContainerHooks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 3)
        self.body.register_forward_hook(lambda m, i, o: o + 0.5)
        self.register_forward_pre_hook(lambda m, i: (i[0] * 2,))

    def forward(self, x):
        return self.out(F.relu(self.body(x)))


@case("tensor hook on a parameter: gradient masked", X(2, 6))
class ParameterHook(Two):
    def __init__(self):
        super().__init__()
        self.b.weight.register_hook(lambda g: g * 0.5)

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("retain_grad and detach_ on an intermediate", X(2, 6))
class DetachInPlace(Two):
    def forward(self, x):
        y = F.relu(self.a(x))
        z = self.b(y)
        t = z.clone().detach_()
        return self.out(z * torch.sigmoid(t))


@case("a nullcontext chosen by a flag, enable_grad inside no_grad", X(2, 6))
class NestedContexts(Two):
    def forward(self, x):
        with torch.no_grad() if not self.training else contextlib.nullcontext():
            y = F.relu(self.a(x))
        with torch.no_grad():
            z = self.b(y)
            with torch.enable_grad():
                w = self.b(y) * 0.5
        return self.out(z + w)


@case("inference_mode in eval for the backbone", X(2, 6))
class InferenceBackbone(Two):
    def backbone(self, x):
        return F.relu(self.a(x))

    def forward(self, x):
        if self.training:
            y = self.backbone(x)
        else:
            with torch.inference_mode():
                y = self.backbone(x)
            y = y.clone()
        return self.out(F.relu(self.b(y)))


@case("buffer aliases a parameter's storage: .data view", X(2, 6))
class AliasedBuffer(Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("snapshot", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.snapshot.copy_(self.b.bias.detach())
        y = F.relu(self.b(F.relu(self.a(x))))
        return self.out(y - self.snapshot)


@case("two parameters of one storage: stacked weight and its rows", X(2, 6))
class StackedRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(2, 8, 6)), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(F.linear(x, self.w[0])) * torch.sigmoid(F.linear(x, self.w[1])))


@case("parameters frozen and unfrozen by requires_grad_ in train()", X(2, 6))
class FreezeInTrain(Two):
    def train(self, mode=True):
        super().train(mode)
        self.a.weight.requires_grad_(not mode)
        return self

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("eval() part inside training: a frozen backbone's dropout", X(2, 6))
class FrozenBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.back, self.out = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU()), nn.Linear(8, 3)

    def train(self, mode=True):
        super().train(mode)
        for m in self.back.modules():
            if isinstance(m, nn.BatchNorm1d | nn.Dropout):
                m.eval()
                for p in m.parameters():
                    p.requires_grad = False
        return self

    def forward(self, x):
        return self.out(self.back(x))


@case("LayerDrop: a layer skipped by a python random number in training", X(2, 6), train=False, reason="python's random numbers")
class LayerDrop(Two):
    def forward(self, x):
        x = self.a(x)
        if not (self.training and torch.rand(()) < 0.5):
            x = x + torch.tanh(self.b(x))
        return self.out(x)


@case("mixup in training: a permutation of the batch", X(4, 6))
class ManifoldMixup(Two):
    def forward(self, x):
        y = F.relu(self.a(x))
        if self.training:
            y = 0.7 * y + 0.3 * y[torch.randperm(y.size(0))]
        return self.out(F.relu(self.b(y)))


@case("masked autoencoder: shuffle by argsort of noise, gather, append mask tokens", X(2, 4, 6))
class MaskedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.d, self.tok, self.out = nn.Linear(6, 8), nn.Linear(8, 7), nn.Parameter(torch.zeros(1, 1, 7)), nn.Linear(7, 6)

    def forward(self, x):
        n, length, d = x.shape
        keep = length // 2
        noise = torch.rand(n, length)
        ids = noise.argsort(1)
        restore = ids.argsort(1)
        y = F.relu(self.e(x.gather(1, ids[:, :keep].unsqueeze(-1).repeat(1, 1, d))))
        y = self.d(y)
        y = torch.cat([y, self.tok.repeat(n, length - keep, 1)], 1)
        y = torch.gather(y, 1, restore.unsqueeze(-1).repeat(1, 1, y.shape[2]))
        return self.out(y)


@case(
    "ragged masks: rows picked by a boolean mask", X(3, 6), bools(3, 4), train=False, reason="data-dependent shapes are refused"
)
class BooleanRows(Two):
    def forward(self, x, m):
        y = F.relu(self.a(x))
        return self.out(y[m[:, 0]])


@case("argmax and comparison of hidden channels as outputs", X(2, 6))
class ArgmaxHidden(Two):
    def forward(self, x):
        y = F.relu(self.a(x))
        return self.out(self.b(y)), y.argmax(-1)


@case("squeeze of a size-one channel axis, unsqueeze elsewhere", X(2, 3, 5, 5))
class SqueezeChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.one, self.lin, self.out = conv(3, 8), conv(8, 1), nn.Linear(25, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.one(F.relu(self.a(x))).squeeze(1).flatten(1)
        return self.out(F.relu(self.lin(y)))


@case("bare squeeze() with a width-one linear", X(2, 5, 6))
class BareSqueeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.s, self.out = nn.Linear(6, 2), nn.Linear(6, 1), nn.Linear(2, 3)

    def forward(self, x):
        w = self.s(x).squeeze().softmax(-1)
        return self.out(torch.einsum("bn,bnd->bd", w, self.a(x)))


@case("a width of two halved: broadcasting must not creep in", X(2, 6))
class WidthTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bias, self.out = nn.Linear(6, 2), nn.Linear(6, 2), nn.Parameter(torch.zeros(2)), nn.Linear(2, 3)

    def forward(self, x):
        y = (self.a(x) * self.b(x) + self.bias).squeeze()
        return self.out(torch.tanh(y).view(x.size(0), -1))


@case("one-hot tokens times a table: embedding by matmul, tied to the head", ints(5, 2, 4))
class OneHotEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.f = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 8)

    def forward(self, ids):
        x = F.one_hot(ids, 5).to(self.table.dtype) @ self.table
        return torch.tanh(self.f(x)) @ self.table.T


@case("buffers and parameters iterated: mean of all buffers added", X(2, 6))
class BuffersIterated(Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("p", torch.rand(8))
        self.register_buffer("q", torch.rand(8))

    def forward(self, x):
        y = F.relu(self.a(x))
        for b in self.buffers():
            y = y + b
        return self.out(F.relu(self.b(y)))


@case("weights read through state_dict in forward", X(2, 6))
class ReadsStateDict(Two):
    def forward(self, x):
        w = self.state_dict()["b.weight"]
        return self.out(F.relu(self.b(F.relu(self.a(x))) + x.new_ones(8) * w.abs().mean()))


@case("weights read through _parameters and _modules", X(2, 6))
class ReadsDicts(Two):
    def forward(self, x):
        y = F.relu(self._modules["a"](x))
        w = self._modules["b"]._parameters["weight"]
        return self.out(F.relu(F.linear(y, w * 2)))


@case("clone of a weight by modules() in a loop: spectral penalty", X(2, 6))
class PenaltyOverModules(Two):
    def forward(self, x):
        y = self.out(F.relu(self.b(F.relu(self.a(x)))))
        pen = x.new_zeros(())
        for m in self.modules():
            if isinstance(m, nn.Linear):
                pen = pen + m.weight.pow(2).sum()
        return y, pen


@case("bias-free statistics: mean of a weight inside a gate", X(2, 6))
class WeightStatistic(Two):
    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x))))) * torch.sigmoid(self.b.weight.mean())
