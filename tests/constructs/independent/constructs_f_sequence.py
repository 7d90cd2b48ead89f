"""Recurrent layers, audio nets, state spaces, sequence models."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, case, ints


@case("bidirectional LSTM of two layers, last hidden states concatenated", X(2, 5, 6))
class BiLstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.out = nn.Linear(6, 8), nn.LSTM(8, 5, 2, batch_first=True, bidirectional=True), nn.Linear(10, 3)

    def forward(self, x):
        _, (h, _) = self.rnn(F.relu(self.a(x)))
        return self.out(torch.cat((h[-2], h[-1]), dim=1))


@case("CRNN: conv features, squeeze height, permute to time, BiLSTM", X(2, 1, 8, 6))
class Crnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, (8, 1))
        self.rnn, self.out = nn.LSTM(8, 4, bidirectional=True), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        b, _c, h, _w = x.size()
        assert h == 1, "the height of conv must be 1"
        r, _ = self.rnn(x.squeeze(2).permute(2, 0, 1))
        t, b, d = r.size()
        return self.out(r.view(t * b, d)).view(t, b, -1)


@case("GRU with an initial state from a linear", X(2, 5, 6), X(2, 4))
class GruInit(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.h, self.rnn, self.out = nn.Linear(6, 8), nn.Linear(4, 7), nn.GRU(8, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x, s):
        y, _ = self.rnn(self.a(x), torch.tanh(self.h(s)).unsqueeze(0))
        return self.out(y)


@case("LSTMCell in a loop over time with zeros made by new_zeros", X(2, 4, 6))
class CellLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.cell, self.out = nn.Linear(6, 8), nn.LSTMCell(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.a(x)
        h = c = x.new_zeros(x.size(0), self.cell.hidden_size)
        ys = []
        for t in range(4):
            h, c = self.cell(x[:, t], (h, c))
            ys.append(self.out(h))
        return torch.stack(ys, dim=1)


@case("attention decoder with a GRUCell fed by its own output", X(2, 4, 6))
class AttnDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.cell, self.q, self.out = nn.Linear(6, 8), nn.GRUCell(11, 7), nn.Linear(7, 8), nn.Linear(7, 3)

    def forward(self, x):
        x = torch.tanh(self.enc(x))
        h, y, ys = x.new_zeros(x.shape[0], 7), x.new_zeros(x.shape[0], 3), []
        for _ in range(3):
            a = torch.softmax(torch.bmm(x, self.q(h).unsqueeze(2)), dim=1)
            h = self.cell(torch.cat([(a * x).sum(1), y], dim=-1), h)
            y = self.out(h)
            ys.append(y)
        return torch.stack(ys, 1)


@case("packed sequence with lengths", X(3, 5, 6), batch=False)
class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.out = nn.Linear(6, 8), nn.GRU(8, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(self.a(x), torch.tensor([5, 3, 2]), batch_first=True)
        _, h = self.rnn(packed)
        return self.out(h[-1])


@case("hand-written GRU: gates by chunk of one linear", X(2, 4, 6))
class HandGru(nn.Module):
    def __init__(self):
        super().__init__()
        self.x2h, self.h2h, self.out = nn.Linear(6, 15), nn.Linear(5, 15), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.zeros(x.shape[0], 5, dtype=x.dtype)
        for t in range(x.shape[1]):
            ir, ii, inn = self.x2h(x[:, t]).chunk(3, 1)
            hr, hi, hn = self.h2h(h).chunk(3, 1)
            r, i = torch.sigmoid(ir + hr), torch.sigmoid(ii + hi)
            n = torch.tanh(inn + r * hn)
            h = n + i * (h - n)
        return self.out(h)


@case("ConvLSTM: four gates by split of a conv over cat", X(2, 3, 2, 4, 4))
class ConvLstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.hid, self.conv, self.out = 5, nn.Conv2d(7, 20, 3, padding=1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        b, t, _, hh, ww = x.shape
        h, c = torch.zeros(b, self.hid, hh, ww).to(x), torch.zeros(b, self.hid, hh, ww).to(x)
        for i in range(t):
            ci, cf, co, cg = torch.split(self.conv(torch.cat([x[:, i], h], dim=1)), self.hid, dim=1)
            c = torch.sigmoid(cf) * c + torch.sigmoid(ci) * torch.tanh(cg)
            h = torch.sigmoid(co) * torch.tanh(c)
        return self.out(h)


@case("WaveNet: gated dilated causal convs, skips summed", X(2, 6, 10), size=(X(2, 6, 16),))
class WaveNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Conv1d(6, 8, 1)
        self.f = nn.ModuleList(nn.Conv1d(8, 7, 2, dilation=2**i) for i in range(2))
        self.g = nn.ModuleList(nn.Conv1d(8, 7, 2, dilation=2**i) for i in range(2))
        self.r, self.s = nn.ModuleList(nn.Conv1d(7, 8, 1) for _ in range(2)), nn.ModuleList(nn.Conv1d(7, 9, 1) for _ in range(2))
        self.out = nn.Conv1d(9, 3, 1)

    def forward(self, x):
        x, skip = self.inp(x), 0
        for i in range(2):
            p = F.pad(x, (2**i, 0))
            z = torch.tanh(self.f[i](p)) * torch.sigmoid(self.g[i](p))
            skip = skip + self.s[i](z)
            x = x + self.r[i](z)
        return self.out(F.relu(skip))


@case("fused_add_tanh_sigmoid_multiply of WaveGlow: slices by a tensor of ints", X(2, 6, 8), X(2, 4, 8))
class WaveGlowGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.n, self.a, self.cond, self.out = 7, nn.Conv1d(6, 14, 3, padding=1), nn.Conv1d(4, 14, 1), nn.Conv1d(7, 3, 1)

    def forward(self, x, c):
        s = self.a(x) + self.cond(c)
        return self.out(torch.tanh(s[:, : self.n, :]) * torch.sigmoid(s[:, self.n :, :]))


@case("TCN: causal conv chomped by a negative slice", X(2, 6, 8))
class Tcn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.down, self.out = (
            nn.Conv1d(6, 8, 3, padding=2),
            nn.Conv1d(8, 7, 3, padding=2),
            nn.Conv1d(6, 7, 1),
            nn.Conv1d(7, 3, 1),
        )

    def forward(self, x):
        y = F.relu(self.a(x)[:, :, :-2].contiguous())
        y = F.relu(self.b(y)[:, :, :-2])
        return self.out(F.relu(y + self.down(x)))[:, :, -1]


@case("Conv-TasNet: encoder, global layer norm, mask by speakers, decoder", X(2, 1, 20))
class TasNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.gn, self.sep = nn.Conv1d(1, 8, 4, stride=2, bias=False), nn.GroupNorm(1, 8, eps=1e-8), nn.Conv1d(8, 16, 1)
        self.dec = nn.ConvTranspose1d(8, 1, 4, stride=2, bias=False)

    def forward(self, x):
        e = F.relu(self.enc(x))
        m = F.relu(self.sep(self.gn(e))).view(x.size(0), 2, e.size(1), -1)
        y = e.unsqueeze(1) * m
        return self.dec(y.view(x.size(0) * 2, e.size(1), -1)).view(x.size(0), 2, -1)


@case("Demucs: GLU over channels, skips cut to length", X(2, 2, 20))
class Demucs(nn.Module):
    def __init__(self):
        super().__init__()
        self.e1, self.g1, self.d1, self.p = (
            nn.Conv1d(2, 6, 4, 2),
            nn.Conv1d(6, 12, 1),
            nn.Conv1d(6, 12, 1),
            nn.ConvTranspose1d(6, 2, 4, 2),
        )

    def forward(self, x):
        skip = F.glu(self.g1(F.relu(self.e1(x))), dim=1)
        y = F.glu(self.d1(skip), dim=1) + skip[..., : skip.shape[-1]]
        return self.p(y)


@case("stft magnitudes into a conv", X(2, 32))
class StftFront(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Conv1d(9, 8, 3, padding=1), nn.Conv1d(8, 3, 1)
        self.register_buffer("window", torch.hann_window(16, dtype=torch.float64))

    def forward(self, x):
        s = torch.stft(x, 16, 8, window=self.window, return_complex=True).abs()
        return self.out(F.relu(self.a(torch.log1p(s))))


@case("SincNet: filters computed from cut-offs", X(2, 1, 24))
class SincConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.band, self.out = nn.Parameter(torch.rand(6, 1)), nn.Parameter(torch.rand(6, 1)), nn.Conv1d(6, 3, 1)
        self.register_buffer("n", torch.arange(1, 4).view(1, -1) * math.pi / 8)

    def forward(self, x):
        low = 0.1 + self.low.abs()
        high = torch.clamp(low + self.band.abs(), 0.2, 3.0)
        left = (torch.sin(high @ self.n) - torch.sin(low @ self.n)) / (self.n / 2)
        f = torch.cat([left, 2 * (high - low), left.flip(1)], dim=1)
        return self.out(F.leaky_relu(F.conv1d(x, f.view(6, 1, 7), padding=3)))


@case("diagonal state space (S4D): complex kernel by Vandermonde, fft convolution", X(2, 6, 8))
class S4d(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.log_dt, self.c, self.d = (
            nn.Conv1d(6, 8, 1),
            nn.Parameter(torch.rand(8)),
            nn.Parameter(torch.randn(8, 2, 2)),
            nn.Parameter(torch.ones(8)),
        )
        self.log_real, self.imag, self.out = nn.Parameter(torch.zeros(8, 2)), nn.Parameter(torch.ones(8, 2)), nn.Conv1d(8, 3, 1)

    def forward(self, u):
        u = self.a(u)
        n = u.size(-1)
        A = -torch.exp(self.log_real) + 1j * self.imag
        dtA = A * torch.exp(self.log_dt).unsqueeze(-1)
        k = torch.exp(dtA.unsqueeze(-1) * torch.arange(n))
        k = 2 * torch.einsum("hn,hnl->hl", torch.view_as_complex(self.c), k).real
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * n) * torch.fft.rfft(k, n=2 * n), n=2 * n)[..., :n]
        return self.out(F.gelu(y + u * self.d.unsqueeze(-1)))


@case("Mamba-like: depthwise causal conv, selective scan in a loop, silu gate", X(2, 5, 6))
class SelectiveScan(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.conv, self.xp = (
            nn.Linear(6, 16),
            nn.Conv1d(8, 8, 3, padding=2, groups=8),
            nn.Linear(8, 2 + 3 + 3, bias=False),
        )
        self.dt, self.A, self.D, self.out = (
            nn.Linear(2, 8),
            nn.Parameter(torch.zeros(8, 3)),
            nn.Parameter(torch.ones(8)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        n = x.shape[1]
        x, z = self.inp(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., :n].transpose(1, 2))
        dt, B, C = torch.split(self.xp(x), [2, 3, 3], dim=-1)
        dt = F.softplus(self.dt(dt))
        dA = torch.exp(torch.einsum("bld,dn->bldn", dt, -torch.exp(self.A)))
        dBx = dt.unsqueeze(-1) * B.unsqueeze(2) * x.unsqueeze(-1)
        h, ys = 0, []
        for i in range(n):
            h = dA[:, i] * h + dBx[:, i]
            ys.append(torch.einsum("bdn,bn->bd", h, C[:, i]))
        return self.out((torch.stack(ys, 1) + x * self.D) * F.silu(z))


@case("RWKV time mix: shift by pad, squared relu, receptance", X(2, 5, 6))
class RwkvChannelMix(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.mk, self.mr = nn.Linear(6, 8), nn.Parameter(torch.rand(1, 1, 8)), nn.Parameter(torch.rand(1, 1, 8))
        self.shift, self.k, self.r, self.v, self.out = (
            nn.ZeroPad2d((0, 0, 1, -1)),
            nn.Linear(8, 12),
            nn.Linear(8, 8),
            nn.Linear(12, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.e(x)
        xx = self.shift(x)
        k = self.k(x * self.mk + xx * (1 - self.mk))
        r = self.r(x * self.mr + xx * (1 - self.mr))
        return self.out(torch.sigmoid(r) * self.v(torch.square(torch.relu(k))))


@case("retention: decay matrix of position differences, group norm", X(2, 4, 6))
class Retention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.g = (nn.Linear(6, 8) for _ in range(4))
        self.gn, self.out = nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, x):
        b, n, _ = x.shape
        i = torch.arange(n)
        d = (0.9 ** (i[:, None] - i[None]).clamp(min=0).to(x.dtype)) * (i[:, None] >= i[None])
        q, k, v = (f(x).view(b, n, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = ((q @ k.mT) * d @ v).transpose(1, 2).reshape(b * n, 8)
        return self.out(F.silu(self.g(x)) * self.gn(y).view(b, n, 8))


@case("conformer convolution module: GLU, depthwise, BN, swish", X(2, 6, 6))
class ConformerConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.ln, self.p1 = nn.Linear(6, 8), nn.LayerNorm(8), nn.Conv1d(8, 16, 1)
        self.dw, self.bn, self.p2, self.out = (
            nn.Conv1d(8, 8, 3, padding=1, groups=8),
            nn.BatchNorm1d(8),
            nn.Conv1d(8, 8, 1),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.e(x)
        y = F.glu(self.p1(self.ln(x).transpose(1, 2)), dim=1)
        y = self.p2(F.silu(self.bn(self.dw(y)))).transpose(1, 2)
        return self.out(x + y)


@case("mask by lengths computed in forward", X(2, 5, 6), ints(5, 2))
class LengthMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, n):
        mask = torch.arange(x.size(1))[None, :] < (n + 1)[:, None]
        x = self.a(x).masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.out(x.sum(1) / mask.sum(1, keepdim=True))


@case("EmbeddingBag and padding_idx", ints(9, 2, 4))
class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.p, self.out = nn.EmbeddingBag(9, 8, mode="mean"), nn.Embedding(9, 8, padding_idx=0), nn.Linear(16, 3)

    def forward(self, ids):
        return self.out(torch.cat([self.e(ids), self.p(ids).sum(1)], -1))


@case("TextCNN: parallel kernels, max over time, cat", ints(9, 2, 6))
class TextCnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.out = nn.Embedding(9, 6), nn.Linear(12, 3)
        self.convs = nn.ModuleList([nn.Conv2d(1, 4, (k, 6)) for k in (2, 3, 4)])

    def forward(self, ids):
        x = self.e(ids).unsqueeze(1)
        x = [F.relu(c(x)).squeeze(3) for c in self.convs]
        return self.out(torch.cat([F.max_pool1d(i, i.size(2)).squeeze(2) for i in x], 1))


@case("tied input and output embedding of a language model", ints(9, 2, 5))
class TiedLm(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.ff, self.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.out.weight = self.e.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.ff(self.e(ids))))
