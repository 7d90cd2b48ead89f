"""How code reaches its weights and writes its tensors: parameter containers, views, in-place writes."""

import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, case, conv, ints


@case("ParameterList in a loop", X(2, 6))
class ParameterLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterList([nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 8))])
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        for w in self.ws:
            x = F.relu(x @ w)
        return self.out(x)


@case("ParameterDict by key, and its values summed as a penalty", X(2, 6))
class ParameterDicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterDict({"w": nn.Parameter(torch.randn(6, 8)), "b": nn.Parameter(torch.zeros(8))})
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(x @ self.ws["w"] + self.ws["b"])), sum(w.pow(2).sum() for w in self.ws.values())


@case("weights by named_parameters in forward", X(2, 6))
class NamedParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        w = dict(self.named_parameters())
        return F.linear(F.relu(F.linear(x, w["a.weight"], w["a.bias"])), w["out.weight"] * 2, w["out.bias"])


@case("get_parameter and getattr with a formatted name", X(2, 6))
class GetParameter(nn.Module):
    def __init__(self):
        super().__init__()
        for i in range(2):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(8, 6 if i == 0 else 8)))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        for i in range(2):
            x = torch.tanh(F.linear(x, getattr(self, f"w{i}")))
        return self.out(x) + self.get_parameter("w1").abs().sum() * 0.1


@case("weights kept in a plain list of tuples", X(2, 6))
class ListOfTuples(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.steps = [(self.a, F.relu), (self.b, torch.tanh)]

    def forward(self, x):
        for layer, act in self.steps:
            x = act(layer(x))
        return self.out(x)


@case("functional_call of a submodule with scaled weights (fast weights)", X(2, 6))
class FastWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.gain, self.out = nn.Linear(6, 8), nn.Parameter(torch.ones(8, 1)), nn.Linear(8, 3)

    def forward(self, x):
        w = {"weight": self.a.weight * self.gain, "bias": self.a.bias}
        return self.out(F.relu(torch.func.functional_call(self.a, w, (x,))))


@case("masked weight (MADE): buffer mask times weight", X(2, 6))
class MaskedLinear(nn.Module):
    class Masked(nn.Linear):
        def __init__(self, i, o):
            super().__init__(i, o)
            self.register_buffer("mask", torch.tril(torch.ones(o, i)))

        def forward(self, x):
            return F.linear(x, self.weight * self.mask, self.bias)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = MaskedLinear.Masked(6, 8), MaskedLinear.Masked(8, 8), MaskedLinear.Masked(8, 6)

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("PixelCNN: the weight's data multiplied by a mask in forward", X(2, 3, 5, 5))
class PixelCnn(nn.Module):
    class Masked(nn.Conv2d):
        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            self.register_buffer("mask", torch.ones_like(self.weight))
            self.mask[:, :, 1, 2:] = 0
            self.mask[:, :, 2:] = 0

        def forward(self, x):
            self.weight.data *= self.mask
            return super().forward(x)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = PixelCnn.Masked(3, 8, 3, padding=1), PixelCnn.Masked(8, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("LoRA: low-rank update beside a frozen weight", X(2, 6))
class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.base, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.A, self.B, self.scaling = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2)), 2.0
        self.base.weight.requires_grad_(False)

    def forward(self, x):
        x = self.a(x)
        return self.out(F.relu(self.base(x) + (x @ self.A.T @ self.B.T) * self.scaling))


@case("hypernetwork: weights from another net by view", X(2, 6), X(4, batched=False))
class HyperNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.h, self.out = nn.Linear(6, 8), nn.Linear(4, 8 * 8 + 8), nn.Linear(8, 3)

    def forward(self, x, z):
        p = self.h(z)
        w, b = p[:64].view(8, 8), p[64:]
        return self.out(F.relu(F.linear(self.a(x), w, b)))


@case("FiLM: gamma and beta by split of a linear, unsqueezed", X(2, 3, 6, 6), X(2, 4))
class Film(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.f, self.out = conv(3, 8), nn.BatchNorm2d(8, affine=False), nn.Linear(4, 16), conv(8, 3)

    def forward(self, x, z):
        g, b = (t[..., None, None] for t in self.f(z).split(8, dim=1))
        return self.out(F.relu(torch.addcmul(b.expand(-1, -1, *x.shape[2:]), self.bn(self.a(x)), g + 1)))


@case("diffusion block: time embedding by sin/cos, broadcast add", X(2, 3, 6, 6), ints(10, 2))
class TimeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.t, self.gn, self.b, self.out = conv(3, 8), nn.Linear(6, 8), nn.GroupNorm(4, 8), conv(8, 8), conv(8, 3)

    def forward(self, x, t):
        f = torch.exp(-torch.arange(3, dtype=x.dtype))
        e = t[:, None].to(x.dtype) * f[None]
        e = self.t(torch.cat([e.sin(), e.cos()], dim=-1))
        h = F.silu(self.gn(self.a(x) + e[:, :, None, None]))
        return self.out(self.b(h))


@case("in-place slice assignment of the channels of a map", X(2, 3, 6, 6))
class InPlaceChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(3, 4), conv(8, 3)

    def forward(self, x):
        y = self.a(x).clone()
        y[:, 2:6] += self.b(x)
        return self.out(F.relu_(y))


@case("write through a view: view, mul_, then the base is read", X(2, 5, 6))
class WriteThroughView(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x) * 1
        v = y.view(x.size(0), -1, 2, 4)
        v[:, :, 0].mul_(2.0)
        return self.out(y)


@case("write through a transposed slice and a chunk", X(2, 5, 6))
class WriteThroughChunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x).tanh()
        z = y + 0.0
        lo = z.transpose(1, 2)[:, :4]
        lo.add_(1.0)
        return self.out(y * z)


@case("the input is modified in place", X(2, 6))
class ModifiesInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        x.mul_(0.5).clamp_(-1, 1)
        return self.out(F.relu(self.a(x), inplace=True))


@case("masked fill with a mask of the activations themselves", X(2, 6))
class SelfMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x)
        y = y.masked_fill(y.abs() < 0.1, 0.3)
        return self.out(torch.where(y > 0.5, y * 2, y))


@case("boolean index assignment", X(2, 6))
class BooleanAssign(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x).clone()
        y[y < 0] = 0.1
        return self.out(y)


@case("index_select of channels by a buffer permutation", X(2, 6))
class PermutedChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("perm", torch.tensor([3, 1, 7, 0, 2, 6, 5, 4]))

    def forward(self, x):
        return self.out(F.relu(self.a(x)[:, self.perm]) + self.a(x).index_select(1, self.perm))


@case("channels picked by a python list, twice the same", X(2, 3, 5, 5))
class PickedChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), conv(5, 3)

    def forward(self, x):
        return self.out(F.relu(self.a(x))[:, [0, 2, 2, 7, 5]])


@case("repeat and tile of channels", X(2, 6))
class RepeatTile(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 4), nn.Linear(20, 3)

    def forward(self, x):
        y = self.a(x)
        return self.out(torch.cat([y.repeat(1, 2), y.tile(2), y.repeat_interleave(1, 1)], 1).relu())


@case("expand of a channel to many, summed by a grouped conv", X(2, 3, 5, 5))
class DepthMultiplier(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.dw, self.out = conv(3, 4), nn.Conv2d(4, 12, 3, padding=1, groups=4), conv(12, 3)

    def forward(self, x):
        return self.out(F.relu(self.dw(F.relu(self.a(x)))))


@case("grouped transposed conv and output padding", X(2, 3, 5, 5))
class GroupedTransposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.t, self.out = (
            conv(3, 8),
            nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1, groups=4),
            conv(12, 3),
        )

    def forward(self, x):
        return self.out(F.elu(self.t(F.relu(self.a(x)))))


@case("3-D convs and mean over time (R(2+1)D)", X(2, 3, 4, 5, 5))
class R2plus1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.s, self.bn, self.t = (
            nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)),
            nn.BatchNorm3d(8),
            nn.Conv3d(8, 6, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.t(F.relu(self.bn(self.s(x))))
        return self.fc(F.adaptive_avg_pool3d(x, (1, 1, 1)).flatten(1))


@case("frames folded into the batch (TSN): view(-1, ...) and mean over segments", X(2, 4, 3, 6, 6))
class SegmentConsensus(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc = conv(3, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = x.view((-1, 3) + x.size()[-2:])  # noqa: RUF005
        y = self.fc(F.relu(self.a(x)).mean((-2, -1)))
        return y.view((-1, 4) + y.size()[1:]).mean(dim=1, keepdim=True).squeeze(1)  # noqa: RUF005


@case("channels_last and contiguous in the middle", X(2, 3, 6, 6))
class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 4), nn.Linear(4 * 9, 3)

    def forward(self, x):
        x = self.a(x.contiguous(memory_format=torch.channels_last))
        x = F.max_pool2d(F.relu(self.b(x)), 2).contiguous()
        return self.fc(x.view(x.size(0), -1))


@case("flatten in channels-last order into a linear", X(2, 3, 4, 4))
class FlattenHwc(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc = conv(3, 5), nn.Linear(80, 3)

    def forward(self, x):
        return self.fc(torch.flatten(F.relu(self.a(x)).permute(0, 2, 3, 1), start_dim=1))


@case("dtype changes: half precision island and bool arithmetic", X(2, 6))
class DtypeIsland(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x).float()
        y = y.sigmoid().type(x.dtype) * (y > 0).to(x.dtype)
        return self.out(y)


@case("complex layer: torch.complex of two linears, abs", X(2, 6))
class ComplexLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        z = torch.complex(self.a(x), self.b(x))
        return self.out((z * z.conj()).real + z.imag)


@case("nn.Unflatten and nn.Flatten around a conv in Sequential", X(2, 12))
class UnflattenSequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(12, 24), nn.ReLU(), nn.Unflatten(1, (6, 2, 2)), conv(6, 8), nn.Flatten(), nn.Linear(32, 3)
        )

    def forward(self, x):
        return self.net(x)


@case("movedim, swapaxes, unflatten of channels into groups", X(2, 5, 6))
class MoveAxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g, self.out = nn.Linear(6, 12), nn.Parameter(torch.randn(3, 4, 4)), nn.Linear(12, 3)

    def forward(self, x):
        y = self.a(x).unflatten(-1, (3, 4)).movedim(2, 0)
        y = torch.einsum("gbnc,gcd->gbnd", y, self.g)
        return self.out(y.permute(1, 2, 3, 0).swapaxes(-1, -2).flatten(-2))
