"""Shared, tied, derived and parametrised weights; embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from .catalogue import conv, image, integers, network, tokens


@network("module called twice", "exact", axis="a.weight:0")
class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 8), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.stem(x))
        return self.b(torch.sigmoid(self.a(torch.sigmoid(self.a(y)))))


@network("module shared by two branches", "exact")
class SharedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.other, self.head = conv(3, 8), conv(3, 8), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.a(x)) + self.head(torch.sigmoid(self.other(x)))


@network("norm shared by two branches", "exact")
class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.other, self.norm, self.head = conv(3, 8), conv(3, 8), nn.BatchNorm2d(8), conv(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.norm(self.a(x)), self.norm(self.other(x)).cos()], 1))


@network("two modules, one parameter", "exact")
class TiedParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.other, self.b = conv(3, 8), conv(3, 8), conv(8, 3)
        self.other.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sigmoid(self.a(x)) + self.other(x.cos()))


@network("tied autoencoder", "exact", tokens(), axis="a.weight:0")
class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.end = nn.Linear(4, 8), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(F.linear(torch.sigmoid(self.a(x)), self.a.weight.t()))


@network("sliced weight", "exact", tokens(), axis="weight:0")
class SlicedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.b = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(12)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sigmoid(F.linear(x, self.weight[:8], self.bias[:8])))


@network("one weight cut into three projections", "exact", tokens(), axis="weight:0")
class CutWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.b = nn.Parameter(torch.randn(24, 4)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.weight.chunk(3)
        return self.b(F.linear(x, q) * F.linear(x, k).sigmoid() + F.linear(x, v))


@network("weight used transposed", "exact", tokens(), axis="weight:1")
class TransposedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.b = nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sigmoid(F.linear(x, self.weight.T)))


@network("weight reshaped before use", "exact", axis="weight:0")
class ReshapedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.b = nn.Parameter(torch.randn(8, 3)), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sigmoid(F.conv2d(x, self.weight[:, :, None, None])))


@network("low-rank weight", "exact", tokens(), axis="up:1")
class LowRank(nn.Module):
    """The rank itself is a channel axis (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.up, self.down = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sigmoid(F.linear(x, self.a.weight + self.up @ self.down, self.a.bias)))


@network("mixture of kernels", "exact", axis="weight:1")
class KernelMixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.mix, self.b = nn.Parameter(torch.randn(3, 8, 3, 3, 3)), nn.Parameter(torch.randn(3)), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.weight * self.mix.softmax(0).view(3, 1, 1, 1, 1)).sum(0)
        return self.b(torch.sigmoid(F.conv2d(x, weight, padding=1)))


@network("weight standardisation", "sound")
class Standardised(nn.Module):
    """Over the inputs, so the consumer's input axis is averaged over; the output axis is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.a(x))
        weight = self.b.weight
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = centred / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self.c(torch.sigmoid(F.conv2d(y, weight, self.b.bias, padding=1)))


@network("weight standardisation, its outputs", "exact", axis="b.weight:0")
class StandardisedOutputs(Standardised):
    pass


class _Parametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 3)
        self.wrap()

    def wrap(self) -> None:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.sigmoid(self.b(torch.sigmoid(self.a(x)))))


@network("weight norm", "exact", axis="b.parametrizations.weight.original1:0")
class WeightNorm(_Parametrised):
    def wrap(self) -> None:
        parametrizations.weight_norm(self.b)


@network("weight norm, its inputs", "sound")
class WeightNormInputs(WeightNorm):
    pass


@network("weight norm over the whole weight", "sound", axis="b.parametrizations.weight.original1:0")
class WeightNormWhole(_Parametrised):
    def wrap(self) -> None:
        parametrizations.weight_norm(self.b, dim=None)


@network("spectral norm", "sound", axis="b.parametrizations.weight.original:0")
class SpectralNorm(_Parametrised):
    def wrap(self) -> None:
        parametrizations.spectral_norm(self.b)


@network("orthogonal weight", "pinned", axis="b.parametrizations.weight.original:0", reason="")
class Orthogonal(_Parametrised):
    """A matrix exponential mixes all rows."""

    def wrap(self) -> None:
        self.b = nn.Conv2d(8, 6, 1)
        parametrizations.orthogonal(self.b, orthogonal_map="matrix_exp")


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6, 1, 1, 1) + 0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.scale


@network("a parametrisation of one's own", "exact", axis="b.parametrizations.weight.original:0")
class OwnParametrisation(_Parametrised):
    def wrap(self) -> None:
        parametrize.register_parametrization(self.b, "weight", _Scaled())


@network("embedding", "exact", integers(), axis="table.weight:1")
class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.b = nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sigmoid(self.table(x)))


@network("embedding's vocabulary", "pinned", integers(), axis="table.weight:0", reason="looked up")
class Vocabulary(Embedding):
    pass


@network("tied embedding and logits", "exact", integers(), axis="table.weight:1")
class TiedLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions, self.inner = nn.Embedding(7, 8), nn.Parameter(torch.randn(1, 5, 8)), nn.Linear(8, 8)
        self.logits = nn.Linear(8, 7, bias=False)
        self.logits.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.table(x) + self.positions
        return self.logits(y + torch.tanh(self.inner(y)))


@network("embedding bag of a sum", "exact", integers(), axis="table.weight:1")
class SummedEmbedding(Embedding):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.embedding(x, self.table.weight).sum(1))


@network("a learned query", "exact", image(), axis="query:1")
class LearnedQuery(nn.Module):
    """Latent positions that belong to no input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.a, self.b = nn.Parameter(torch.randn(4, 8)), conv(3, 8), nn.Linear(6 * 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b((self.query @ torch.sigmoid(self.a(x)).flatten(2)).sum(1))
