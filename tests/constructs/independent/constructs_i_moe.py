"""Mixtures, routers, recommenders, heads, and modules of torch seldom used."""

import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, case, conv, ints


@case("soft mixture of experts: stack of experts, weighted by softmax", X(2, 6))
class SoftMoe(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.gate = nn.Linear(6, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8)) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.inp(x)
        g = F.softmax(self.gate(x), dim=-1)
        y = torch.stack([e(x) for e in self.experts], dim=1)
        return self.out(torch.einsum("be,bed->bd", g, y))


@case("top-2 router with renormalised weights, dense experts by one_hot", X(2, 4, 6))
class TopKRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.gate = nn.Linear(6, 8), nn.Linear(8, 3, bias=False)
        self.w1, self.w2, self.out = nn.Parameter(torch.randn(3, 8, 10)), nn.Parameter(torch.randn(3, 10, 8)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.inp(x)
        w, i = torch.topk(F.softmax(self.gate(x), dim=-1), 2, dim=-1)
        w = w / w.sum(dim=-1, keepdim=True)
        g = (F.one_hot(i, 3).to(w.dtype) * w.unsqueeze(-1)).sum(-2)
        h = F.silu(torch.einsum("bnd,edf->bnef", x, self.w1))
        y = torch.einsum("bnef,efd->bned", h, self.w2)
        return self.out((y * g.unsqueeze(-1)).sum(2))


@case("experts' weights gathered per sample (bmm)", X(2, 6), ints(3, 2))
class GatheredExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.w, self.b, self.out = (
            nn.Linear(6, 8),
            nn.Parameter(torch.randn(3, 8, 7)),
            nn.Parameter(torch.zeros(3, 7)),
            nn.Linear(7, 3),
        )

    def forward(self, x, task):
        x = self.inp(x)
        y = torch.bmm(x.unsqueeze(1), self.w[task]).squeeze(1) + self.b[task]
        return self.out(F.relu(y))


@case("sparse experts with where(mask) rows and index_add", X(2, 4, 6))
class SparseExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.gate, self.experts, self.out = (
            nn.Linear(6, 8),
            nn.Linear(8, 2),
            nn.ModuleList(nn.Linear(8, 8) for _ in range(2)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        b, n, _ = x.shape
        x = self.inp(x).view(b * n, -1)
        choice = self.gate(x).argmax(-1)
        y = torch.zeros_like(x)
        for i, e in enumerate(self.experts):
            rows = torch.where(choice == i)[0]
            y.index_add_(0, rows, e(x[rows]))
        return self.out(y.view(b, n, -1))


@case("multi-gate mixture (MMoE) with two towers", X(2, 6))
class Mmoe(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.gates = (
            nn.ModuleList(nn.Linear(6, 8) for _ in range(2)),
            nn.ModuleList(nn.Linear(6, 2) for _ in range(2)),
        )
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1)) for _ in range(2))

    def forward(self, x):
        e = torch.cat([F.relu(f(x)).unsqueeze(1) for f in self.experts], dim=1)
        outs = []
        for g, t in zip(self.gates, self.towers):
            outs.append(t(torch.matmul(g(x).softmax(1).unsqueeze(1), e).squeeze(1)))
        return tuple(outs)


@case("SwiGLU with a fused gate and up projection, RMSNorm by hand", X(2, 4, 6))
class SwiGlu(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.g, self.w12, self.w3, self.out = (
            nn.Linear(6, 8),
            nn.Parameter(torch.ones(8)),
            nn.Linear(8, 20, bias=False),
            nn.Linear(10, 8),
            nn.Linear(8, 3),
        )

    def norm(self, x):
        v = x.float().pow(2).mean(-1, keepdim=True).to(x.dtype)
        return self.g * (x * torch.rsqrt(v + 1e-6))

    def forward(self, x):
        x = self.e(x)
        a, b = self.w12(self.norm(x)).chunk(2, dim=-1)
        return self.out(x + self.w3(F.silu(a) * b))


@case("RMSNorm of torch, GeGLU with tensor_split", X(2, 4, 6))
class GeGlu(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.n, self.w, self.o, self.out = (
            nn.Linear(6, 8),
            nn.RMSNorm(8),
            nn.Linear(8, 24),
            nn.Linear(12, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.e(x)
        a, g = torch.tensor_split(self.w(self.n(x)), 2, dim=-1)
        return self.out(x + self.o(a * F.gelu(g)))


@case("GLU by interleaved channels [..., ::2]", X(2, 6))
class InterleavedGlu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x)
        return self.out(y[..., ::2].clamp(max=7.0) * torch.sigmoid(1.7 * y[..., 1::2]))


@case("parallel attention and feed-forward from one projection (PaLM)", X(2, 4, 6))
class ParallelBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.f, self.ao, self.fo, self.out = (
            nn.Linear(6, 8),
            nn.Linear(8, 8 + 4 + 4 + 20),
            nn.Linear(8, 8),
            nn.Linear(10, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.e(x)
        q, k, v, ff = self.f(x).split((8, 4, 4, 20), dim=-1)
        q = q.unflatten(-1, (2, 4)).transpose(1, 2)
        s = torch.einsum("bhid,bjd->bhij", q, k).softmax(-1)
        y = torch.einsum("bhij,bjd->bhid", s, v).transpose(1, 2).flatten(2)
        a, g = ff.chunk(2, -1)
        return self.out(x + self.ao(y) + self.fo(a * F.silu(g)))


@case("factorisation machine: square of sum minus sum of squares", ints(7, 2, 4))
class FactorisationMachine(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.w, self.a, self.out = nn.Embedding(7, 6), nn.Embedding(7, 1), nn.Linear(24, 8), nn.Linear(8, 1)

    def forward(self, ids):
        v = self.e(ids)
        fm = 0.5 * (v.sum(1).pow(2) - v.pow(2).sum(1)).sum(1, keepdim=True)
        return torch.sigmoid(fm + self.w(ids).sum(1) + self.out(F.relu(self.a(v.flatten(1)))))


@case("DLRM: pairwise dots by bmm, lower triangle by index lists", X(2, 4), ints(7, 2, 2))
class Dlrm(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.bot, self.top = (
            nn.Embedding(7, 6),
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)),
            nn.Linear(9, 1),
        )

    def forward(self, d, ids):
        x = self.bot(d)
        t = torch.cat([x.unsqueeze(1), self.e(ids)], 1)
        z = torch.bmm(t, t.transpose(1, 2))
        li = torch.tensor([i for i in range(3) for j in range(i)])
        lj = torch.tensor([j for i in range(3) for j in range(i)])
        return self.top(torch.cat([x, z[:, li, lj]], dim=1))


@case("cross network of DCN: x0 times scalar of xl, kept width", X(2, 6))
class CrossNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.b, self.out = (
            nn.Linear(6, 8),
            nn.ModuleList(nn.Linear(8, 1, bias=False) for _ in range(2)),
            nn.Parameter(torch.zeros(2, 8)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x0 = xl = self.a(x)
        for i, w in enumerate(self.w):
            xl = x0 * w(xl) + self.b[i] + xl
        return self.out(xl)


@case("capsules: squash and routing by agreement in a loop", X(2, 6))
class Capsules(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w = nn.Linear(6, 12), nn.Parameter(torch.randn(1, 3, 2, 5, 4))

    def forward(self, x):
        u = self.a(x).view(x.size(0), 3, 1, 4, 1)
        u_hat = (self.w @ u).squeeze(-1)
        b = torch.zeros(x.size(0), 3, 2, 1, dtype=x.dtype)
        for _ in range(2):
            s = (F.softmax(b, dim=2) * u_hat).sum(dim=1, keepdim=True)
            n = s.pow(2).sum(-1, keepdim=True)
            v = n / (1 + n) * s / torch.sqrt(n + 1e-8)
            b = b + (u_hat * v).sum(-1, keepdim=True)
        return v.squeeze(1).norm(dim=-1)


@case("NetVLAD: soft assignment, residuals to centroids, intra-normalised", X(2, 3, 4, 4))
class NetVlad(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.assign, self.c, self.out = conv(3, 6), nn.Conv2d(6, 4, 1), nn.Parameter(torch.rand(4, 6)), nn.Linear(24, 3)

    def forward(self, x):
        x = self.a(x)
        n, c = x.shape[:2]
        s = F.softmax(self.assign(x).view(n, 4, -1), dim=1)
        f = x.view(n, c, -1)
        r = f.expand(4, -1, -1, -1).permute(1, 0, 2, 3) - self.c.expand(f.size(-1), -1, -1).permute(1, 2, 0).unsqueeze(0)
        v = F.normalize((r * s.unsqueeze(2)).sum(dim=-1), p=2, dim=2)
        return self.out(v.view(n, -1))


@case("KAN layer: spline bases of inputs, einsum with coefficients", X(2, 6))
class Kan(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c, self.base = nn.Linear(6, 5), nn.Parameter(torch.randn(3, 5, 4)), nn.Linear(5, 3)
        self.register_buffer("grid", torch.linspace(-1, 1, 4))

    def forward(self, x):
        x = torch.tanh(self.a(x))
        phi = torch.exp(-(((x.unsqueeze(-1) - self.grid) / 0.5) ** 2))
        return self.base(F.silu(x)) + torch.einsum("bik,oik->bo", phi, self.c)


@case("MLP-Mixer: token mixing on the transposed", X(2, 4, 6))
class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.t, self.c = (
            nn.Linear(6, 8),
            nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 4)),
            nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8)),
        )
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.e(x)
        x = x + self.t(x.transpose(1, 2)).transpose(1, 2)
        return self.out((x + self.c(x)).mean(1))


@case("gMLP: spatial gating unit with conv1d over tokens", X(2, 4, 6))
class SpatialGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.p, self.sp, self.o = nn.Linear(6, 12), nn.LayerNorm(6), nn.Conv1d(4, 4, 1), nn.Linear(6, 3)

    def forward(self, x):
        u, v = F.gelu(self.e(x)).chunk(2, dim=-1)
        return self.o(u * (self.sp(self.p(v)) + 1))


@case("hard gates: straight-through round of a parameter", X(2, 6))
class StraightThrough(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g, self.out = nn.Linear(6, 8), nn.Parameter(torch.rand(8)), nn.Linear(8, 3)

    def forward(self, x):
        soft = torch.sigmoid(self.g)
        hard = (soft > 0.5).to(soft.dtype) + soft - soft.detach()
        return self.out(F.relu(self.a(x)) * hard)


@case("fake quantisation by hand: per-channel scales of the weight", X(2, 6))
class FakeQuant(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        w = self.b.weight
        s = w.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
        q = w + (torch.clamp(torch.round(w / s), -128, 127) * s - w).detach()
        return self.out(F.relu(F.linear(F.relu(self.a(x)), q, self.b.bias)))


@case("Gumbel softmax in training, argmax one_hot in eval", X(2, 6))
class GumbelChoice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g, self.v = nn.Linear(6, 8), nn.Linear(8, 4), nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        z = self.g(F.relu(self.a(x)))
        w = F.gumbel_softmax(z, tau=0.7) if self.training else F.one_hot(z.argmax(-1), 4).to(z.dtype)
        return w @ self.v


@case("local response norm over channels", X(2, 3, 5, 5))
class LocalResponse(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.lrn, self.out = conv(3, 8), nn.LocalResponseNorm(3), conv(8, 3)

    def forward(self, x):
        return self.out(self.lrn(F.relu(self.a(x))))


@case("PReLU per channel, RReLU, Softplus, Hardtanh, Threshold", X(2, 3, 5, 5))
class Activations(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out, self.p = conv(3, 8), conv(8, 8), conv(8, 3), nn.PReLU(8)
        self.f = nn.Sequential(nn.Softplus(beta=2), nn.Hardtanh(-1, 2), nn.Threshold(0.1, 0.5), nn.Mish(), nn.Tanhshrink())

    def forward(self, x):
        return self.out(self.f(self.b(self.p(self.a(x)))))


@case("Snake activation with a per-channel alpha", X(2, 6, 8))
class Snake(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.alpha, self.out = nn.Conv1d(6, 8, 3, padding=1), nn.Parameter(torch.ones(1, 8, 1)), nn.Conv1d(8, 3, 1)

    def forward(self, x):
        x = self.a(x)
        return self.out(x + (self.alpha.abs() + 1e-9).reciprocal() * torch.sin(self.alpha * x).pow(2))


@case("LayerNorm over (C, H, W), GroupNorm with one group per channel", X(2, 3, 4, 4))
class NormsOfMaps(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.ln, self.b, self.gn, self.out = (
            conv(3, 8),
            nn.LayerNorm([8, 4, 4]),
            conv(8, 6),
            nn.GroupNorm(6, 6),
            conv(6, 3),
        )

    def forward(self, x):
        return self.out(F.relu(self.gn(self.b(F.relu(self.ln(self.a(x)))))))


@case("BatchNorm1d on (N, L, C) by transposes, momentum None", X(4, 5, 6))
class BnCumulative(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.bn(self.a(x).transpose(1, 2)).transpose(1, 2)))
