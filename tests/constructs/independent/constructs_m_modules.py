"""Modules of torch that are seldom used, losses as modules, linear algebra."""

import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, case, conv, ints


@case("InstanceNorm with running statistics and affine", X(3, 3, 5, 5))
class InstanceNormTracked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.out = conv(3, 8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), conv(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.n(self.a(x))))


@case("SyncBatchNorm in one process", X(4, 3, 5, 5))
class SyncBn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.out = conv(3, 8), nn.BatchNorm2d(8), conv(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.n(self.a(x))) + self.n.weight.view(1, -1, 1, 1).abs().sum() * 0.1)


@case("LSTM with a projection", X(2, 4, 6))
class ProjectedLstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.out = nn.Linear(6, 8), nn.LSTM(8, 7, proj_size=5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.rnn(self.a(x))[0])


@case("nn.RNN with relu, three layers, dropout 0", X(2, 4, 6))
class ReluRnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.out = nn.Linear(6, 8), nn.RNN(8, 5, 3, nonlinearity="relu"), nn.Linear(5, 3)

    def forward(self, x):
        y, h = self.rnn(self.a(x).transpose(0, 1))
        return self.out(y[-1]), h.mean()


@case("adaptive log-softmax", X(4, 6), ints(9, 4))
class AdaptiveSoftmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.h = nn.Linear(6, 8), nn.AdaptiveLogSoftmaxWithLoss(8, 9, [3, 6], div_value=2.0)

    def forward(self, x, y):
        return self.h.log_prob(F.relu(self.a(x)))


@case("CTC loss in forward", X(2, 8, 6))
class CtcInForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        lp = self.out(F.relu(self.a(x))).log_softmax(-1).transpose(0, 1)
        b = x.size(0)
        return F.ctc_loss(lp, torch.tensor([[1, 2, 3]]).expand(b, -1), torch.full((b,), 8), torch.full((b,), 3))


@case("triplet margin loss module on embeddings of one net", X(2, 6), X(2, 6), X(2, 6))
class Triplet(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.loss = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), nn.TripletMarginLoss(margin=0.5)

    def forward(self, a, p, n):
        return self.loss(self.net(a), self.net(p), self.net(n))


@case("Transformer of torch, encoder and decoder", X(2, 4, 8), X(2, 3, 8))
class FullTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.t, self.out = nn.Linear(8, 8), nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True), nn.Linear(8, 3)

    def forward(self, s, t):
        return self.out(self.t(self.e(s), t))


@case("MultiheadAttention with other widths of keys and values", X(2, 4, 8), X(2, 5, 6))
class MhaKdim(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(6, 10)
        self.mha, self.out = nn.MultiheadAttention(8, 2, kdim=10, vdim=10, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, c):
        c = F.relu(self.kv(c))
        return self.out(self.mha(self.q(x), c, c, need_weights=False)[0])


@case("MultiheadAttention with bias_kv and zero_attn", X(2, 4, 8))
class MhaBiasKv(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.mha, self.out = (
            nn.Linear(8, 8),
            nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.q(x).transpose(0, 1)
        return self.out(self.mha(x, x, x)[0])


@case("LPPool, FractionalMaxPool by ratio left out, AvgPool ceil mode", X(2, 3, 7, 7))
class Pools(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.p, self.q, self.out = (
            conv(3, 8),
            nn.LPPool2d(2, 2),
            nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
            conv(8, 3),
        )

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.out(self.q(y)), self.out(self.p(y))


@case("Softmax2d, LogSigmoid, Softsign and Hardshrink", X(2, 3, 5, 5))
class MoreActivations(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(8, 8), conv(8, 3)
        self.f, self.s = nn.Sequential(nn.LogSigmoid(), nn.Softsign(), nn.Hardshrink(0.1)), nn.Softmax2d()

    def forward(self, x):
        return self.s(self.out(self.f(self.b(self.f(self.a(x))))))


@case("blur pool: fixed kernel expanded to the channels", X(2, 3, 6, 6))
class BlurPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), conv(8, 3)
        k = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("k", (k[:, None] * k[None] / 16)[None, None])

    def forward(self, x):
        x = F.relu(self.a(x))
        k = self.k.expand(x.shape[1], -1, -1, -1)
        return self.out(F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), k, stride=2, groups=x.shape[1]))


@case("blur by a kernel buffer repeated at construction", X(2, 3, 6, 6))
class BlurRepeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), conv(8, 3)
        self.register_buffer("k", torch.full((8, 1, 3, 3), 1 / 9.0))

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.out(F.conv2d(x, self.k, padding=1, groups=x.size(1)))


@case("fixed DCT matrix on channels", X(2, 5, 6))
class FixedDct(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        n = torch.arange(8.0)
        self.register_buffer("dct", torch.cos(torch.pi / 8 * (n[None] + 0.5) * n[:, None]))

    def forward(self, x):
        return self.out(F.relu(self.a(x)) @ self.dct.T)


@case("whitening by an inverse square root of the covariance", X(6, 6), batch=False)
class Whitening(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = self.a(x)
        y = y - y.mean(0, keepdim=True)
        c = y.T @ y / (x.size(0) - 1) + 1e-2 * torch.eye(4, dtype=x.dtype)
        return self.out(torch.linalg.solve_triangular(torch.linalg.cholesky(c), y.T, upper=False).T)


@case("matrix exponential of a skew weight (orthogonal)", X(2, 6))
class ExpSkew(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.out = nn.Linear(6, 5), nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.a(x) @ torch.matrix_exp(self.w - self.w.T))


@case("Kronecker product of two small weights", X(2, 6))
class KronLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.p, self.q, self.out = (
            nn.Linear(6, 8),
            nn.Parameter(torch.randn(3, 2)),
            nn.Parameter(torch.randn(2, 4)),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        return self.out(F.relu(F.linear(self.a(x), torch.kron(self.p, self.q))))


@case("diagonal and low-rank weight: diag_embed, outer", X(2, 6))
class DiagLowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.d, self.u, self.v, self.out = (
            nn.Linear(6, 8),
            nn.Parameter(torch.ones(8)),
            nn.Parameter(torch.randn(8)),
            nn.Parameter(torch.randn(8)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.out(F.relu(self.a(x) @ (torch.diag_embed(self.d) + torch.outer(self.u, self.v))))


@case("tensor train: weight contracted from two cores", X(2, 6))
class TensorTrain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g1, self.g2, self.out = (
            nn.Linear(6, 8),
            nn.Parameter(torch.randn(2, 3, 4)),
            nn.Parameter(torch.randn(4, 4, 2)),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        w = torch.einsum("iar,rjb->ijab", self.g1, self.g2).reshape(8, 6)
        return self.out(F.relu(self.a(x) @ w))


@case("block-diagonal weight by torch.block_diag", X(2, 6))
class BlockDiag(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.ws, self.out = nn.Linear(6, 8), nn.ParameterList([torch.randn(3, 4), torch.randn(2, 4)]), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(F.relu(F.linear(self.a(x), torch.block_diag(*self.ws))))


@case("sparse attention by scatter of -inf at non-topk scores", X(2, 5, 6))
class TopkAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        s = self.q(x) @ self.k(x).mT
        v, i = s.topk(3, dim=-1)
        s = torch.full_like(s, float("-inf")).scatter(-1, i, v)
        return self.out(s.softmax(-1) @ self.v(x))


@case("Longformer-like chunks: as_strided windows", X(2, 8, 6), batch=False)
class AsStridedWindows(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = F.relu(self.a(x)).contiguous()
        b, n, c = y.shape
        y = y.as_strided((b, 3, 4, c), (n * c, 2 * c, c, 1))
        return self.out(y.mean(2))


@case("relative shift of Transformer-XL: pad, view, slice", X(2, 4, 6))
class RelShift(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.r, self.v, self.out = (
            nn.Linear(6, 8),
            nn.Linear(6, 8),
            nn.Parameter(torch.randn(4, 8)),
            nn.Linear(6, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        q = self.q(x)
        bd = q @ self.r.T
        b, n, m = bd.shape
        bd = torch.cat([torch.zeros(b, n, 1, dtype=x.dtype), bd], dim=-1).view(b, m + 1, n)[:, 1:].view_as(bd)
        return self.out(((q @ self.k(x).mT + bd) / 8**0.5).softmax(-1) @ self.v(x))


@case("LSH-like bucketing: sort by a random projection buffer, undo by argsort", X(2, 6, 6))
class SortUndo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("proj", torch.randn(6))

    def forward(self, x):
        order = (x @ self.proj).argsort(dim=1)
        y = torch.take_along_dim(self.a(x), order.unsqueeze(-1), dim=1)
        y = y.view(x.size(0), 3, 2, -1).cumsum(2).flatten(1, 2)
        return self.out(y.gather(1, order.argsort(1).unsqueeze(-1).expand_as(y)))


@case("mixture density: split into pi, mu and sigma, log-likelihood by logsumexp", X(2, 6), X(2, 2))
class MixtureDensity(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3 + 3 * 2 * 2)

    def forward(self, x, y):
        pi, mu, ls = torch.split(self.out(torch.tanh(self.a(x))), [3, 6, 6], dim=-1)
        mu, ls = mu.view(-1, 3, 2), ls.view(-1, 3, 2)
        lp = -0.5 * ((y.unsqueeze(1) - mu) / ls.exp()) ** 2 - ls
        return -torch.logsumexp(pi.log_softmax(-1) + lp.sum(-1), dim=-1)


# A removed unit has no entropy: the scale at which that of a normal distribution is zero.
@case("torch.distributions Normal with rsample in training", X(2, 6), fill={"s.bias:0": -1.3001761815551522})
class DistributionHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.mu, self.s, self.out = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = F.relu(self.a(x))
        d = torch.distributions.Normal(self.mu(h), F.softplus(self.s(h)) + 1e-3, validate_args=False)
        return self.out(d.rsample() if self.training else d.mean), d.entropy().sum(-1)


@case("dueling Q-network: value plus advantage minus its mean", X(2, 6))
class Dueling(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.v, self.adv = (
            nn.Linear(6, 8),
            nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1)),
            nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4)),
        )

    def forward(self, x):
        h = F.relu(self.a(x))
        adv = self.adv(h)
        return self.v(h) + adv - adv.mean(dim=1, keepdim=True)


@case("noisy linear: buffers of noise multiplied in training only", X(2, 6))
class NoisyLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.mu, self.sigma, self.out = (
            nn.Linear(6, 8),
            nn.Parameter(torch.randn(7, 8)),
            nn.Parameter(torch.full((7, 8), 0.1)),
            nn.Linear(7, 3),
        )
        self.register_buffer("eps", torch.randn(7, 8))

    def forward(self, x):
        w = self.mu + self.sigma * self.eps if self.training else self.mu
        return self.out(F.relu(F.linear(F.relu(self.a(x)), w)))
