"""Couplings that are easy to get wrong: broadcasts, shared weights, sliced weights, merged axes."""

import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, case, conv


@case("weight sliced in forward: slimmable linear", X(2, 6))
class SlicedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.b, self.out = (
            nn.Linear(6, 8),
            nn.Parameter(torch.randn(12, 10)),
            nn.Parameter(torch.zeros(12)),
            nn.Linear(7, 3),
        )

    def forward(self, x):
        return self.out(F.relu(F.linear(self.a(x), self.w[:7, :8], self.b[:7])))


@case("two weights concatenated into one product", X(2, 6))
class ConcatenatedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w1, self.w2, self.out = (
            nn.Linear(6, 8),
            nn.Parameter(torch.randn(5, 8)),
            nn.Parameter(torch.randn(4, 8)),
            nn.Linear(9, 3),
        )

    def forward(self, x):
        return self.out(F.relu(F.linear(self.a(x), torch.cat([self.w1, self.w2], 0))))


@case("q, k and v from chunks of one in_proj weight", X(2, 4, 6))
class InProjChunks(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.w, self.b, self.out = (
            nn.Linear(6, 8),
            nn.Parameter(torch.randn(24, 8)),
            nn.Parameter(torch.zeros(24)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.e(x)
        (wq, wk, wv), (bq, bk, bv) = self.w.chunk(3), self.b.chunk(3)
        q, k, v = F.linear(x, wq, bq), F.linear(x, wk, bk), F.linear(x, wv, bv)
        return self.out((q @ k.mT / 8**0.5).softmax(-1) @ v)


@case("weight and its transpose in one network, with other biases", X(2, 6))
class WeightAndTranspose(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.b1, self.b2, self.out = (
            nn.Linear(6, 8),
            nn.Parameter(torch.randn(5, 8)),
            nn.Parameter(torch.zeros(5)),
            nn.Parameter(torch.zeros(8)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        h = F.relu(F.linear(self.a(x), self.w, self.b1))
        return self.out(F.relu(F.linear(h, self.w.t(), self.b2)))


@case("conv weight reused in conv_transpose2d (tied autoencoder)", X(2, 3, 6, 6))
class TiedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 6, stride=2)

    def forward(self, x):
        y = F.relu(self.b(F.relu(self.a(x))))
        y = F.relu(F.conv_transpose2d(y, self.b.weight, stride=2, padding=1, output_padding=1))
        return F.conv_transpose2d(y, self.a.weight, padding=1)


@case("conv applied with its kernel flipped and rotated (equivariance)", X(2, 3, 6, 6))
class RotatedKernels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(8, 6), conv(6, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        w = self.b.weight
        y = torch.stack([F.conv2d(x, torch.rot90(w, k, (2, 3)), padding=1) for k in range(4)], 2)
        return self.out(y.amax(2))


@case("a one-channel gate broadcast over channels", X(2, 3, 6, 6))
class OneChannelGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g, self.out = conv(3, 8), conv(3, 1), conv(8, 3)

    def forward(self, x):
        return self.out(self.a(x) * self.g(x).sigmoid() + self.g(x))


@case("a parameter of shape (C, 1, 1) against maps, and a scalar one", X(2, 3, 6, 6))
class BroadcastParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.s, self.t, self.out = conv(3, 8), nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.ones(1)), conv(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.a(x) * self.s - self.t))


@case("outer broadcast of two channel axes, reduced over one", X(2, 6))
class OuterBroadcast(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(5, 3)

    def forward(self, x):
        m = torch.tanh(self.a(x).unsqueeze(2) * self.b(x).unsqueeze(1))
        return self.out(m.sum(-1))


@case("channels folded into the batch for a shared one-channel conv", X(2, 3, 6, 6))
class ChannelsInBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.s, self.out = conv(3, 8), conv(1, 1), conv(8, 3)

    def forward(self, x):
        y = self.a(x)
        b, c, h, w = y.shape
        return self.out(F.relu(self.s(y.view(b * c, 1, h, w)).view(b, c, h, w)))


@case("channels and height merged for a recurrent layer", X(2, 1, 4, 6))
class ChannelsTimesHeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.out = conv(1, 6), nn.GRU(24, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        b, c, h, w = y.size()
        return self.out(self.rnn(y.permute(0, 3, 1, 2).reshape(b, w, c * h))[0])


@case("a multi-scale flatten: two maps flattened and concatenated", X(2, 3, 8, 8))
class MultiScaleFlatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6, stride=2), conv(6, 5, stride=2), nn.Linear(6 * 16 + 5 * 4, 3)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        return self.fc(torch.cat([a.flatten(1), b.flatten(1)], 1))


@case("spatial pyramid: adaptive pools of several sizes flattened", X(2, 3, 8, 8), size=(X(2, 3, 6, 9),))
class SpatialPyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc = conv(3, 6), nn.Linear(6 * 5, 3)

    def forward(self, x):
        a = F.relu(self.a(x))
        return self.fc(torch.cat([F.adaptive_max_pool2d(a, s).view(x.size(0), -1) for s in (1, 2)], 1))


@case("a hidden map that is also an output", X(2, 3, 6, 6))
class HiddenOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(8, 6), conv(6, 3)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        return {"out": self.out(b), "feature": a.detach(), "norm": b.norm(dim=1)}


@case("input concatenated back to the features (CoordConv)", X(2, 3, 6, 5), size=(X(2, 3, 4, 7),))
class CoordConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(13, 6), conv(6, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        b, _, h, w = y.shape
        yy = torch.linspace(-1, 1, h, dtype=x.dtype).view(1, 1, h, 1).expand(b, -1, -1, w)
        xx = torch.linspace(-1, 1, w, dtype=x.dtype).view(1, 1, 1, w).expand(b, -1, h, -1)
        return self.out(F.relu(self.b(torch.cat([y, x, xx, yy], 1))))


@case("cosine and exp of channels, constants added, then a depthwise conv", X(2, 3, 6, 6))
class NonZeroAtZero(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.dw, self.out = conv(3, 8), conv(8, 8, groups=8, bias=False), conv(8, 3)

    def forward(self, x):
        y = torch.cos(self.a(x)) + torch.exp(-self.a(x).abs()) + 1.5
        return self.out(F.softplus(self.dw(y)))


@case("padding with ones before a conv, replication pad after", X(2, 3, 6, 6))
class PadWithOnes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 3, 3)

    def forward(self, x):
        y = F.pad(self.a(x), (1, 1, 1, 1), value=1.0)
        y = F.pad(F.relu(self.b(y)), (1, 1, 1, 1), mode="replicate")
        return self.out(y)


@case("one conv feeds two norms; one norm serves two convs", X(4, 3, 6, 6))
class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(3, 8)
        self.n1, self.n2, self.out = nn.BatchNorm2d(8), nn.BatchNorm2d(8), conv(16, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.out(torch.cat([self.n1(a) + self.n1(b), F.relu(self.n2(a))], 1))


@case("uneven groups: cat of two maps into a grouped conv that crosses the seam", X(2, 3, 6, 6))
class GroupsAcrossSeam(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.g, self.out = conv(3, 4), conv(3, 8), conv(12, 9, groups=3), conv(9, 3)

    def forward(self, x):
        return self.out(F.relu(self.g(torch.cat([self.a(x), self.b(x)], 1))))


@case("split sizes unlike the widths that made them", X(2, 3, 6, 6))
class ResplitCat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 5), conv(3, 7), conv(4, 3), conv(8, 3)

    def forward(self, x):
        y = F.relu(torch.cat([self.a(x), self.b(x)], 1))
        p, q = y.split([4, 8], 1)
        return self.c(p) + self.d(q)


@case("sum of differently shifted channel windows", X(2, 6))
class ShiftedWindows(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 10), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x)
        return self.out(F.relu(y[:, :-2] + y[:, 2:] - y[:, 1:-1]))


@case("reshape (C) to (C/4, 4), norm over the inner, product with a table", X(2, 8))
class GroupedInner(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.t, self.out = nn.Linear(8, 12), nn.Parameter(torch.randn(3, 4)), nn.Linear(12, 3)

    def forward(self, x):
        y = self.a(x).view(-1, 3, 4)
        y = F.layer_norm(y, (4,)) * self.t
        return self.out(y.reshape(x.size(0), -1))


@case("classifier over classes times anchors from a shared tower", X(2, 3, 6, 6))
class SharedTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.q, self.tower, self.cls, self.reg = (
            conv(3, 8),
            conv(3, 8, stride=2),
            nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8)),
            conv(8, 6),
            conv(8, 4),
        )

    def forward(self, x):
        outs = [(self.cls(t), self.reg(t).exp()) for t in (self.tower(self.p(x)), self.tower(self.q(x)))]
        return [c.permute(0, 2, 3, 1).reshape(x.size(0), -1, 3) for c, _ in outs], [r for _, r in outs]


@case("correlation volume of two feature maps (optical flow)", X(2, 3, 4, 4), X(2, 3, 4, 4))
class Correlation(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.out = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8)), conv(16, 3)

    def forward(self, x, y):
        a, b = self.f(x), self.f(y)
        n, c, h, w = a.shape
        corr = torch.matmul(a.view(n, c, h * w).transpose(1, 2), b.view(n, c, h * w)) / torch.sqrt(torch.tensor(c).to(a))
        return self.out(corr.view(n, h * w, h, w))


@case("local correlation by shifted products, mean over channels", X(2, 3, 5, 5), X(2, 3, 5, 5))
class LocalCorrelation(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.out = conv(3, 8), conv(9, 3)

    def forward(self, x, y):
        a, b = self.f(x), F.pad(self.f(y), (1, 1, 1, 1))
        h, w = a.shape[2:]
        c = [(a * b[:, :, i : i + h, j : j + w]).mean(1, keepdim=True) for i in range(3) for j in range(3)]
        return self.out(torch.cat(c, 1))


@case("Gram matrix of features, normalised by their number", X(2, 3, 4, 4))
class GramMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 4), nn.Linear(16, 3)

    def forward(self, x):
        f = self.b(F.relu(self.a(x)))
        b, c, h, w = f.size()
        f = f.view(b, c, h * w)
        return self.fc((f @ f.transpose(1, 2)).div(c * h * w).flatten(1))


@case("non-local block: theta, phi and g at half width, zero-init residual", X(2, 3, 4, 4))
class NonLocal(nn.Module):
    def __init__(self):
        super().__init__()
        self.s, self.th, self.ph, self.g, self.w, self.out = (
            conv(3, 8),
            conv(8, 4, 1),
            conv(8, 4, 1),
            conv(8, 4, 1),
            conv(4, 8, 1),
            conv(8, 3),
        )

    def forward(self, x):
        x = self.s(x)
        b = x.size(0)
        g = F.max_pool2d(self.g(x), 2).view(b, 4, -1).permute(0, 2, 1)
        f = self.th(x).view(b, 4, -1).permute(0, 2, 1) @ F.max_pool2d(self.ph(x), 2).view(b, 4, -1)
        y = (F.softmax(f, dim=-1) @ g).permute(0, 2, 1).contiguous().view(b, 4, *x.size()[2:])
        return self.out(self.w(y) + x)


@case("dual attention of DANet: channel affinity, max minus energy", X(2, 3, 4, 4))
class ChannelAffinity(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.gamma, self.out = conv(3, 6), nn.Parameter(torch.zeros(1)), conv(6, 3)

    def forward(self, x):
        x = self.a(x)
        b, c, h, w = x.size()
        q = x.view(b, c, -1)
        e = torch.bmm(q, q.permute(0, 2, 1))
        e = torch.max(e, -1, keepdim=True)[0].expand_as(e) - e
        return self.out(self.gamma * torch.bmm(F.softmax(e, -1), q).view(b, c, h, w) + x)


@case("embedding table as queries of a mask head (MaskFormer): einsum with maps", X(2, 3, 4, 4))
class MaskQueries(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.pix, self.q = conv(3, 8), conv(8, 6), nn.Embedding(4, 8)
        self.mlp, self.cls = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6)), nn.Linear(8, 3)

    def forward(self, x):
        m = self.pix(F.relu(self.a(x)))
        q = self.q.weight.unsqueeze(0).repeat(x.size(0), 1, 1)
        return torch.einsum("bqc,bchw->bqhw", self.mlp(q), m), self.cls(q)
