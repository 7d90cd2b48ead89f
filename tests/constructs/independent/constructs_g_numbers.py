"""Sizes as numbers, control flow on sizes and types, arguments."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, case, conv, ints


@case("an int argument by position", X(2, 6), 2)
class IntPositional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, times):
        x = self.a(x)
        for _ in range(times):
            x = torch.tanh(x)
        return self.out(x)


@case("None by position between tensors", X(2, 6), None, X(2, 6))
class NoneBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, mask=None, y=None):
        x = self.a(x) + self.b(y)
        if mask is not None:
            x = x * mask
        return self.out(x)


@case("keyword inputs: a tensor and a flag", X(2, 6), kwargs={"y": X(2, 6), "flag": True})
class KeywordInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, *, y, flag=False):
        h = self.a(x) * torch.sigmoid(self.b(y))
        return self.out(h) if flag else h


@case("**kwargs handed on to a submodule", X(2, 6), kwargs={"scale": X(2, 1)})
class StarKwargs(nn.Module):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(6, 8)

        def forward(self, x, scale=None, **_):
            return self.l(x) * scale

    def __init__(self):
        super().__init__()
        self.i, self.out = StarKwargs.Inner(), nn.Linear(8, 3)

    def forward(self, x, **kwargs):
        return self.out(F.relu(self.i(x, **kwargs)))


@case("*args: several inputs fused", X(2, 6), X(2, 6), X(2, 6))
class StarArgs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, *xs):
        return self.out(sum(F.relu(self.a(x)) for x in xs) / len(xs))


@case("a dict of tensors as the input", {"rgb": X(2, 6), "depth": X(2, 4)})
class DictInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.ModuleDict({"rgb": nn.Linear(6, 8), "depth": nn.Linear(4, 8)})
        self.out = nn.Linear(16, 3)

    def forward(self, batch):
        return {"y": self.out(torch.cat([F.relu(self.enc[k](v)) for k, v in batch.items()], -1))}


@case("a list of tensors as the input", [X(2, 3, 8, 8), X(2, 3, 4, 4)])
class ListInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(3, 8), conv(8, 3)

    def forward(self, feats):
        hi, lo = feats
        return self.out(F.relu(self.a(hi) + F.interpolate(self.b(lo), size=hi.shape[2:], mode="nearest")))


@case("a tuple input and tuple output of states", X(2, 6), (X(2, 5), X(2, 5)))
class TupleState(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.cell, self.out = nn.Linear(6, 8), nn.LSTMCell(8, 5), nn.Linear(5, 3)

    def forward(self, x, state):
        h, c = self.cell(F.relu(self.a(x)), state)
        return self.out(h), (h, c)


@case("width halved by y.shape[1] // 2", X(2, 3, 6, 6))
class HalfOfShape(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 12), conv(6, 3)

    def forward(self, x):
        y = self.a(x)
        c = y.shape[1] // 2
        return self.out(y[:, :c] * torch.sigmoid(y[:, c:]))


@case("scaled by the square root of the width, and by numel", X(2, 6))
class SqrtOfDim(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x)
        y = self.b(y * y.shape[-1] ** -0.5)
        return self.out(y) * (y.numel() / y.size(0)) + math.log(y.size(1))


@case("a width as an output beside the tensor", X(2, 6))
class WidthOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.out(y), y.shape[-1] * 1.0


@case("branch on the width of a map", X(2, 6))
class BranchOnWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x)
        z = self.b(F.relu(y))
        if y.shape[-1] > z.shape[-1]:
            z = z * 2
        return self.out(z)


@case("branch on the number of dimensions and on dtype", X(2, 5, 6))
class BranchOnDims(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x)
        if y.dim() == 3 and y.dtype == torch.float64:
            y = y.mean(dim=1)
        return self.out(y if not torch.is_complex(y) else y.real)


@case("residual only if shapes agree", X(2, 3, 6, 6))
class ResidualIfSame(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.convs, self.out = conv(3, 8), nn.ModuleList([conv(8, 8), conv(8, 10), conv(10, 10)]), conv(10, 3)

    def forward(self, x):
        x = self.stem(x)
        for c in self.convs:
            y = F.relu(c(x))
            x = y + x if y.shape == x.shape else y
        return self.out(x)


@case("isinstance on submodules in a loop over children", X(2, 3, 6, 6))
class LoopOverChildren(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Identity(), conv(8, 8))
        self.out = conv(8, 3)

    def forward(self, x):
        for m in self.body.children():
            x = F.relu(m(x)) if isinstance(m, nn.Conv2d) else m(x)
        return self.out(x)


@case("zeros of a computed width, written by slices", X(2, 6))
class ZerosOfWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 5), nn.Linear(6, 7), nn.Linear(12, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        buf = torch.zeros(x.size(0), a.size(1) + b.size(1), dtype=x.dtype)
        buf[:, : a.size(1)] = a
        buf[:, a.size(1) :] = b
        return self.out(F.relu(buf))


@case("one_hot of a width that follows another layer", X(2, 6), ints(8, 2))
class OneHotWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, y):
        h = self.a(x)
        return self.out(h * (1 + F.one_hot(y, num_classes=h.shape[-1]).to(h)))


@case("arange over channels as a positional scale", X(2, 6))
class ArangeChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x)
        return self.out(h * (1.0 / (1 + torch.arange(h.shape[1], dtype=h.dtype, device=h.device))))


@case("eye of the width: a residual in the weight", X(2, 6))
class EyeResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.out = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x)
        return self.out(h @ (self.w + torch.eye(h.shape[-1], dtype=h.dtype)))


@case("orthogonality loss: W W^T - I", X(2, 6))
class OrthogonalLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        w = self.a.weight
        reg = (w @ w.t() - torch.eye(w.size(0), dtype=w.dtype)).pow(2).sum()
        return self.out(F.relu(self.a(x))), reg


@case("L1 of all parameters in forward", X(2, 6))
class L1OfParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.a(x))), sum(p.abs().sum() for p in self.parameters())


@case("mean of a hidden map as an auxiliary output", X(2, 6))
class ActivityRegulariser(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.out(h), h.mean()


@case("sum of squares of a hidden map as an auxiliary output", X(2, 6), fill={"a.bias:0": -1e6})
class ActivitySum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.sigmoid(self.a(x))
        return self.out(h), h.pow(2).sum()


@case("distillation loss on hidden maps inside forward: mse_loss over channels", X(2, 6))
class HintLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.s, self.t, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        s, t = self.s(x), self.t(x).detach()
        return self.out(F.relu(s)), F.mse_loss(s, t)


@case("cross entropy with labels inside forward, loss and logits", X(2, 6), ints(3, 2))
class LossInForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.out(F.gelu(self.a(x), approximate="tanh"))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), label_smoothing=0.1)
        return {"loss": loss, "logits": logits}


@case("ArcFace: normalised features and weight, margin by where and one_hot", X(2, 6), ints(4, 2))
class ArcFace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.w = nn.Linear(6, 8), nn.Linear(8, 5), nn.Parameter(torch.randn(4, 5))

    def forward(self, x, y):
        cos = F.linear(F.normalize(self.b(F.relu(self.a(x)))), F.normalize(self.w)).clamp(-0.99, 0.99)
        phi = torch.cos(torch.acos(cos) + 0.5)
        hot = torch.zeros_like(cos).scatter_(1, y.view(-1, 1).long(), 1)
        return 8.0 * (hot * phi + (1.0 - hot) * cos)


@case("NT-Xent: similarity matrix of the batch with a masked diagonal", X(4, 6), batch=False)
class NtXent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x):
        z = F.normalize(self.b(F.relu(self.bn(self.a(x)))), dim=-1)
        sim = (z @ z.T / 0.5).masked_fill(torch.eye(z.size(0), dtype=torch.bool), -1e9)
        return F.cross_entropy(sim, torch.arange(z.size(0)).roll(2))


@case("Barlow twins: cross-correlation over the batch, diagonal off", X(4, 6), X(4, 6))
class BarlowTwins(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Linear(6, 8), nn.Linear(8, 5, bias=False), nn.BatchNorm1d(5, affine=False)

    def forward(self, x, y):
        f, g = self.bn(self.b(F.relu(self.a(x)))), self.bn(self.b(F.relu(self.a(y))))
        c = f.T @ g / x.shape[0]
        on = torch.diagonal(c).add(-1).pow(2).sum()
        off = c.flatten()[:-1].view(4, 6)[:, 1:].flatten().pow(2).sum()
        return on + 0.005 * off


@case("type(x)(...) and string formats of sizes in a key", X(2, 3, 6, 6))
class FormattedKeys(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        return {f"map_{len(y.shape)}": self.b(y), "n": [self.b(y).mean(), self.b(y).amax((1, 2, 3))]}


@case("assert on widths with a message from the shape", X(2, 6))
class AssertWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x)
        assert y.shape[-1] == self.out.in_features, f"got {y.shape[-1]}"
        torch._assert(y.dim() == 2, "two dimensions")
        return self.out(F.relu(y))
