"""Structures of well-known networks, each in a few lines: mixers, gates, pyramids, experts, recurrence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import Heads
from .catalogue import conv, integers, network, tokens


@network("talking heads", "exact", tokens())
class TalkingHeads(Heads):
    """Shazeer et al. 2020: heads mixed by a linear before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = self.before((q @ k.mT * 0.5).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


@network("cross-attention", "exact", lambda batch=2: (torch.randn(batch, 5, 4), torch.randn(batch, 7, 4)))
class CrossAttention(Heads):
    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        q, k, v = self.cut(self.a(x)), self.cut(self.k(memory)), self.cut(self.v(memory))
        return self.b(self.attend(q, k, v).transpose(1, 2).flatten(2))


@network("attention in shifted windows with a mask", "exact", tokens(8))
class ShiftedWindows(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([[0.0] * 4, [0.0, 0.0, -9.0, -9.0]])[:, None, None, :])

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n, heads, length, width = q.shape
        windows = [t.roll(-2, 2).view(n, heads, length // 4, 4, width).transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        scores = (windows[0] @ windows[1].mT * 0.5).unflatten(0, (n, 2)) + self.mask
        y = scores.softmax(-1).flatten(0, 1) @ windows[2]
        return y.view(n, length // 4, heads, 4, width).transpose(1, 2).flatten(2, 3).roll(2, 2)


@network("mixer over tokens and channels", "exact", tokens(), axis="first.weight:0")
class Mixer(nn.Module):
    """Tolstikhin et al. 2021. Tokens come from the input and stay; the hidden widths of both MLPs go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.first, self.second = nn.Linear(4, 8), nn.Linear(5, 12), nn.Linear(12, 5)
        self.third, self.fourth, self.b = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y = y + self.second(F.gelu(self.first(y.mT))).mT
        return self.b(y + self.fourth(F.gelu(self.third(y))))


@network("gated MLP (SwiGLU of two projections)", "exact", tokens(), axis="gate.weight:0")
class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@network("mixture of experts, densely routed", "exact", tokens(), axis="experts.1.0.weight:0")
class Experts(nn.Module):
    """Every expert sees every token; experts are pruned apart, their number stays (the softmax is over them)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.router = nn.Linear(4, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8)) for _ in range(3))
        self.b = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        shares = self.router(y).softmax(-1)
        each = torch.stack([expert(y) for expert in self.experts], -2)
        return self.b(y + (each * shares.unsqueeze(-1)).sum(-2))


@network("mixture of experts in one tensor", "exact", tokens(), axis="inward:2")
class FusedExperts(nn.Module):
    """All experts' weights in one parameter [experts, in, hidden], by einsum: their hidden units go together."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Parameter(torch.randn(3, 4, 10)), nn.Parameter(torch.randn(3, 10, 4))
        self.router, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(torch.einsum("ntc,ech->nteh", x, self.inward))
        each = torch.einsum("nteh,ehc->ntec", hidden, self.outward)
        return self.b(torch.einsum("ntec,nte->ntc", each, self.router(x).softmax(-1)))


@network("U-Net", "exact")
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.deep = conv(3, 8), nn.Conv2d(8, 12, 2, 2), conv(12, 12)
        self.up, self.join, self.c = nn.ConvTranspose2d(12, 8, 2, 2), conv(16, 8), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = F.relu(self.a(x))
        y = self.up(F.relu(self.deep(F.relu(self.down(skip)))))
        return self.c(F.relu(self.join(torch.cat([skip, y], 1))))


@network("feature pyramid", "exact", axis="lateral.weight:0")
class Pyramid(nn.Module):
    """Lin et al. 2017: lateral convolutions and what is resized to them share channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 2, 2)
        self.lateral, self.top, self.out = nn.Conv2d(8, 6, 1), nn.Conv2d(12, 6, 1), conv(6, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fine = F.relu(self.a(x))
        coarse = self.top(F.relu(self.deep(fine)))
        return self.out(self.lateral(fine) + F.interpolate(coarse, size=fine.shape[-2:])), self.out(coarse)


@network("cross-stage partial", "exact")
class CrossStagePartial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.c = conv(3, 8), conv(4, 4), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.a(x).chunk(2, 1)
        return self.c(torch.cat([first, second + F.relu(self.inner(second))], 1).tanh())


@network("Res2Net's hierarchy of splits", "exact")
class Hierarchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = conv(3, 16), conv(16, 3)
        self.steps = nn.ModuleList(conv(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = torch.split(F.relu(self.a(x)), 4, 1)
        done, y = [first], torch.zeros_like(first)
        for piece, step in zip(rest, self.steps):
            y = F.relu(step(piece + y))
            done.append(y)
        return self.c(torch.cat(done, 1))


@network("selective kernels", "exact", axis="first.weight:0")
class SelectiveKernels(nn.Module):
    """Li et al. 2019: a softmax over the branches, for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8), nn.Conv2d(3, 8, 5, padding=2)
        self.squeeze, self.excite, self.c = nn.Linear(8, 6), nn.Linear(6, 16), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = torch.stack([F.relu(self.first(x)), F.relu(self.second(x))], 1)
        shares = self.excite(F.relu(self.squeeze(branches.sum(1).mean((2, 3)))))
        shares = shares.view(-1, 2, 8).softmax(1)
        return self.c((branches * shares[..., None, None]).sum(1))


@network("split attention", "exact")
class SplitAttention(nn.Module):
    """Zhang et al. 2022 (ResNeSt): a radix of 2 in 2 groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.squeeze, self.excite, self.c = conv(3, 16), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 16, 1), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.a(x))
        n, _, h, w = y.shape
        parts = y.reshape(n, 2, 8, h, w)
        gate = self.excite(F.relu(self.squeeze(parts.sum(1).mean((2, 3), keepdim=True))))
        return self.c((parts * gate.view(n, 2, 8, 1, 1).softmax(1)).sum(1))


@network("groups of groups: every stage doubles the channels of each", "exact")
class GroupsOfGroups(nn.Module):
    """8 channels become 8 x 2, then 8 x 2 x 2 (FastViT's stages)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = conv(3, 8), conv(32, 3)
        self.first, self.second = nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 32, 3, padding=1, groups=16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.relu(self.second(F.relu(self.first(F.relu(self.a(x)))))))


@network("re-parametrised branches", "exact")
class Reparametrised(nn.Module):
    """Ding et al. 2021 (RepVGG): a 3 x 3, a 1 x 1 and an identity branch, each with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.wide, self.narrow, self.c = conv(3, 8), conv(8, 8), nn.Conv2d(8, 8, 1), conv(8, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.a(x))
        return self.c(F.relu(self.norms[0](self.wide(y)) + self.norms[1](self.narrow(y)) + self.norms[2](y)))


class Conv1D(nn.Module):
    """A linear whose weight is [in, out], as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


@network("linears stored [in, out]", "exact", tokens(), axis="a.weight:1")
class TransposedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv1D(4, 8), Conv1D(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.gelu(self.a(x)))


@network("gradient checkpointing", "exact")
class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.c = conv(3, 8), nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8)), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: Any = self.a(x)
        if self.training:
            return self.c(checkpoint(self.inner, y, use_reentrant=False))
        return self.c(self.inner(y))


@network("detached branch", "exact")
class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.other = conv(3, 8), conv(8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.relu(self.a(x))
        return self.c(y), self.other(y.detach().mean((2, 3)))


@network("frozen layers", "exact")
class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = conv(3, 8).requires_grad_(False), nn.BatchNorm2d(8).requires_grad_(False), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.relu(self.norm(self.a(x))))


class Sequences(nn.Module):
    """A recurrent layer between linears."""

    kind, options, width = nn.LSTM, {}, 6

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 7), nn.Linear(self.width, 5), nn.Linear(5, 3)
        self.cell = self.kind(7, 6, batch_first=True, **self.options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.cell(torch.sigmoid(self.a(x)))[0]))


network("LSTM, what it reads", "exact", tokens())(Sequences)
network("LSTM, its gates", "inexact", tokens(), axis="cell.weight_ih_l0:0")(Sequences)


@network("GRU of two layers in both directions", "inexact", tokens(), axis="cell.weight_hh_l1_reverse:1")
class BothDirections(Sequences):
    kind, options, width = nn.GRU, {"num_layers": 2, "bidirectional": True}, 12


@network("LSTM with projections", "inexact", tokens(), axis="cell.weight_hr_l0:1")
class Projected(Sequences):
    options, width = {"proj_size": 4}, 4


@network("the last state of an RNN", "inexact", tokens(), axis="cell.weight_hh_l0:0")
class LastState(Sequences):
    kind = nn.RNN

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.cell(self.a(x))[1].squeeze(0)))


@network("LSTM cell in a loop", "exact", tokens(), axis="cell.weight_ih:0")
class Loop(nn.Module):
    """The state passes through the graph, so masks reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.b = nn.LSTMCell(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = x.new_zeros(x.shape[0], 6)
        for k in range(5):
            h, c = self.cell(x[:, k], (h, c))
        return self.b(h)


@network("tagger: embedding, LSTM, tied output", "sound", integers(), axis="lstm.weight_ih_l0:0")
class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(7, 6), nn.LSTM(6, 6, batch_first=True)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return F.linear(self.lstm(self.embedding(words))[0], self.embedding.weight)
