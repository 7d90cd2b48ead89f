"""Unusual ops, one a construct."""

import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, case, ints


class Two(nn.Module):
    """A linear layer, the op of the subclass, a linear layer."""

    width = 8

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(self.width, 3)

    def forward(self, x):
        return self.out(self.op(self.a(x)))


@case("cumsum over the sequence", X(2, 5, 6))
class CumsumSequence(Two):
    def op(self, x):
        return x.cumsum(1) / torch.arange(1, x.size(1) + 1, dtype=x.dtype)[:, None]


@case("cumsum over channels", X(2, 5, 6))
class CumsumChannels(Two):
    def op(self, x):
        return torch.cumsum(x, dim=-1)


@case("topk over channels as a sparse activation: scatter back", X(2, 6))
class KSparse(Two):
    def op(self, x):
        v, i = x.topk(3, dim=-1)
        return torch.zeros_like(x).scatter(-1, i, v)


@case("topk over tokens, gathered with an expanded index", X(2, 5, 6))
class TokenPruning(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.s, self.out = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x)
        idx = self.s(x).squeeze(-1).topk(2, dim=1).indices
        x = x.gather(1, idx.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return self.out(x)


@case("sort of the sequence per channel, quantile pooling", X(2, 5, 6))
class SortPool(Two):
    def op(self, x):
        return x.sort(dim=1, descending=True)[0][:, :2].sum(1)


@case("sort over channels", X(2, 6))
class SortChannels(Two):
    def op(self, x):
        return x.sort(-1).values


@case("roll over channels", X(2, 6))
class RollChannels(Two):
    def op(self, x):
        return x + torch.roll(x, 1, dims=-1)


@case("temporal shift of TSM: slices of channels shifted in time", X(2, 4, 6))
class TemporalShift(Two):
    def op(self, x):
        out = torch.zeros_like(x)
        f = x.shape[-1] // 4
        out[:, :-1, :f] = x[:, 1:, :f]
        out[:, 1:, f : 2 * f] = x[:, :-1, f : 2 * f]
        out[:, :, 2 * f :] = x[:, :, 2 * f :]
        return out


@case("flip of channels", X(2, 6))
class FlipChannels(Two):
    def op(self, x):
        return F.relu(x).flip(-1)


@case("einsum with three operands over channels", X(2, 5, 6))
class EinsumThree(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.w, self.out = nn.Linear(6, 8), nn.Linear(6, 4), nn.Parameter(torch.randn(8, 4, 5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.einsum("bni,bnj,ijk->bnk", self.a(x), self.b(x), self.w))


@case("bilinear pooling: outer product, signed square root, normalise", X(2, 5, 6))
class BilinearPooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(20, 3)

    def forward(self, x):
        y = torch.bmm(self.a(x).transpose(1, 2), self.b(x)) / x.size(1)
        y = y.view(x.size(0), -1)
        return self.out(F.normalize(torch.sign(y) * torch.sqrt(y.abs() + 1e-10)))


@case("nn.Bilinear of two inputs", X(2, 6), X(2, 4))
class TorchBilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bi, self.out = nn.Linear(6, 8), nn.Linear(4, 6), nn.Bilinear(8, 6, 5), nn.Linear(5, 3)

    def forward(self, x, y):
        return self.out(F.relu(self.bi(self.a(x), self.b(y))))


@case("tensordot with a parameter", X(2, 5, 6))
class Tensordot(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.out = nn.Linear(6, 8), nn.Parameter(torch.randn(4, 8)), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tensordot(self.a(x), self.w, dims=([-1], [1])))


@case("cdist to learned centres (RBF)", X(2, 6))
class RbfLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c, self.out = nn.Linear(6, 8), nn.Parameter(torch.randn(5, 8)), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.exp(-torch.cdist(self.a(x), self.c).pow(2)))


@case("cosine similarity of two towers", X(2, 6), X(2, 6))
class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.q = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(6, 5)

    def forward(self, x, y):
        return F.cosine_similarity(self.b(F.relu(self.a(x))), self.q(y), dim=-1)


@case("pairwise_distance of siamese embeddings of one layer", X(2, 6), X(2, 6))
class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x, y):
        f, g = (self.b(torch.tanh(self.a(t))) for t in (x, y))
        return F.pairwise_distance(f, g, keepdim=True)


@case("logsumexp over the sequence", X(2, 5, 6))
class LogSumExpPool(Two):
    def op(self, x):
        return torch.logsumexp(x * 2, dim=1) / 2


@case("softmax over channels as a gate", X(2, 5, 6))
class ChannelSoftmax(Two):
    def op(self, x):
        return x * x.softmax(-1)


@case("statistics pooling: mean and std over time, cat", X(2, 5, 6))
class StatsPool(Two):
    width = 16

    def op(self, x):
        return torch.cat((x.mean(1), x.std(dim=1)), dim=-1)


@case("std over channels as a number per sample", X(2, 6))
class StdOverChannels(Two):
    def op(self, x):
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + 1e-3)


@case("generalised mean pooling with a learned p", X(2, 5, 6))
class GemPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.p, self.out = nn.Linear(6, 8), nn.Parameter(torch.ones(1) * 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x).clamp(min=1e-6).pow(self.p)
        return self.out(F.avg_pool1d(x.transpose(1, 2), x.size(1)).pow(1.0 / self.p).flatten(1))


@case("rfft filter of GFNet: complex weight times spectrum", X(2, 4, 4, 6))
class GlobalFilter(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.out = nn.Linear(6, 8), nn.Parameter(torch.randn(4, 3, 8, 2)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x)
        y = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.w)
        return self.out(torch.fft.irfft2(y, s=(x.shape[1], x.shape[2]), dim=(1, 2), norm="ortho"))


@case("spectral convolution of FNO: modes written into zeros, complex einsum", X(2, 8, 6))
class SpectralConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.out = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 5, 3, dtype=torch.cfloat)), nn.Linear(5, 3)

    def forward(self, x):
        x = self.a(x).permute(0, 2, 1)
        ft = torch.fft.rfft(x)
        out = torch.zeros(x.shape[0], 5, x.size(-1) // 2 + 1, dtype=ft.dtype)
        out[:, :, :3] = torch.einsum("bix,iox->box", ft[:, :, :3], self.w.to(ft.dtype))
        return self.out(torch.fft.irfft(out, n=x.size(-1)).permute(0, 2, 1))


@case("unfold along time: local windows", X(2, 6, 6))
class LocalWindows(Two):
    def op(self, x):
        return F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).amax(-1)


@case("fold of unfolded patches", X(2, 36, 6))
class FoldPatches(Two):
    def op(self, x):
        b, _n, c = x.shape
        u = F.unfold(x.transpose(1, 2).reshape(b, c, 6, 6), 2, stride=2)
        return F.fold(u * 2, (6, 6), 2, stride=2).flatten(2).transpose(1, 2)


@case("scatter_add of messages to nodes (GNN)", X(5, 6, batched=False), ints(5, 2, 8, batched=False), batch=False)
class GraphConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x, edges):
        x = self.a(x)
        src, dst = edges[0], edges[1]
        msg = self.b(x)[src]
        agg = torch.zeros_like(x).scatter_add_(0, dst.unsqueeze(1).expand_as(msg), msg)
        return self.out(F.relu(x + agg))


@case("index_add with degrees by bincount", X(5, 6, batched=False), ints(5, 2, 8, batched=False), batch=False)
class IndexAdd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, edges):
        x = self.a(x)
        deg = torch.bincount(edges[1], minlength=x.size(0)).clamp(min=1).to(x.dtype)
        y = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]) / deg[:, None]
        return self.out(F.elu(y))


@case("graph attention: cat of pairs, softmax over masked neighbours", X(2, 4, 6))
class Gat(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.a, self.out = nn.Linear(6, 8, bias=False), nn.Parameter(torch.randn(16, 1)), nn.Linear(8, 3)

    def forward(self, x):
        h = self.w(x)
        n = h.size(1)
        pairs = torch.cat([h.repeat_interleave(n, dim=1), h.repeat(1, n, 1)], dim=2).view(-1, n, n, 2 * h.size(-1))
        e = F.leaky_relu(torch.matmul(pairs, self.a).squeeze(3), 0.2)
        return self.out(F.elu(torch.softmax(e, dim=2) @ h))


@case("knn graph of DGCNN: topk of distances, gathered neighbours, max", X(2, 6, 5))
class EdgeConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.conv, self.out = nn.Conv1d(6, 4, 1), nn.Conv2d(8, 6, 1), nn.Conv1d(6, 3, 1)

    def forward(self, x):
        x = self.a(x)
        b, c, n = x.shape
        xx = (x**2).sum(dim=1, keepdim=True)
        idx = (2 * x.transpose(2, 1) @ x - xx - xx.transpose(2, 1)).topk(k=3, dim=-1)[1]
        idx = (idx + torch.arange(0, b).view(-1, 1, 1) * n).view(-1)
        t = x.transpose(2, 1).contiguous()
        f = t.view(b * n, -1)[idx, :].view(b, n, 3, c)
        t = t.view(b, n, 1, c).repeat(1, 1, 3, 1)
        y = self.conv(torch.cat((f - t, t), dim=3).permute(0, 3, 1, 2).contiguous())
        return self.out(y.max(dim=-1, keepdim=False)[0])


@case("PointNet: max over points, repeated and concatenated", X(2, 6, 5), size=(X(2, 6, 7),))
class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv1d(6, 4, 1), nn.Conv1d(4, 8, 1), nn.Conv1d(12, 3, 1)

    def forward(self, x):
        n = x.size()[2]
        p = F.relu(self.a(x))
        g = torch.max(self.b(p), 2, keepdim=True)[0].view(-1, 8)
        return self.out(torch.cat([g.view(-1, 8, 1).repeat(1, 1, n), p], 1))


@case("median over time and over channels", X(2, 5, 6))
class Medians(Two):
    def op(self, x):
        return x - x.median(dim=1, keepdim=True).values + x.median(dim=-1, keepdim=True)[0]


@case("nanmean of features with missing values", X(2, 5, 6))
class NanMean(Two):
    def op(self, x):
        return torch.where(x > -0.2, x, torch.nan).nanmean(dim=1).nan_to_num(0.0)


@case("lerp and addcmul between two maps", X(2, 6))
class LerpAddcmul(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.t, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Parameter(torch.zeros(8)), nn.Linear(8, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.out(torch.addcmul(torch.lerp(a, b, self.t.sigmoid()), a, b, value=0.5))


@case("baddbmm and addmm by hand", X(2, 5, 6))
class Baddbmm(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.u = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.zeros(8)), nn.Parameter(torch.randn(8, 3))
        self.c = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        h = torch.addmm(self.b, x.view(-1, 6), self.w).view(x.size(0), -1, 8).relu()
        return torch.baddbmm(self.c, h, self.u.unsqueeze(0).expand(x.size(0), -1, -1), beta=0.5, alpha=2.0)
