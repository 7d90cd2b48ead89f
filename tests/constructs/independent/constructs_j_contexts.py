"""Gradient contexts, scripted and wrapped parts, things that ask about the surroundings."""

import copy
import functools
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .registry import X, case, conv


class Two(nn.Module):
    """Two linear layers for the subclasses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)


@case("no_grad around a branch: its weights get no gradient", X(2, 6))
class NoGradBranch(Two):
    def forward(self, x):
        x = self.a(x)
        with torch.no_grad():
            t = self.b(x).sigmoid()
        return self.out(x * t)


@case("no_grad as a decorator of a method (teacher)", X(2, 6))
class NoGradMethod(Two):
    @torch.no_grad()
    def teacher(self, x):
        return F.relu(self.b(self.a(x)))

    def forward(self, x):
        return self.out(F.relu(self.a(x)) + self.teacher(x))


@case("set_grad_enabled(self.training)", X(2, 6))
class GradIfTraining(Two):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            x = F.relu(self.a(x))
        return self.out(self.b(x))


@case("frozen part: detach between stages", X(2, 6))
class DetachBetween(Two):
    def forward(self, x):
        x = F.relu(self.a(x)).detach()
        return self.out(F.relu(self.b(x)))


@case("autocast to bfloat16 around a layer", X(2, 6))
class Autocast(Two):
    def forward(self, x):
        x = self.a(x)
        with torch.autocast("cpu", enabled=False):
            x = F.relu(self.b(x.to(torch.float64)))
        return self.out(x)


@case("EMA teacher updated in forward in training", X(2, 6))
class EmaTeacher(Two):
    def __init__(self):
        super().__init__()
        self.t = copy.deepcopy(self.a)
        for p in self.t.parameters():
            p.requires_grad_(False)

    @torch.no_grad()
    def update(self):
        for s, t in zip(self.a.parameters(), self.t.parameters()):
            t.data = t.data * 0.9 + s.data * 0.1

    def forward(self, x):
        if self.training:
            self.update()
        y = F.relu(self.a(x))
        return self.out(y), F.mse_loss(self.b(y), self.b(F.relu(self.t(x))))


@case("gradient of the output by the input (forces), create_graph", X(2, 6))
class Forces(Two):
    def forward(self, x):
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            e = self.out(torch.tanh(self.b(torch.tanh(self.a(x))))).sum()
            return e, -torch.autograd.grad(e, x, create_graph=True)[0]


def _gelu(x):
    return x * 0.5 * (1.0 + torch.erf(x / 1.41421))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and in much code all the same
    _scripted_gelu = torch.jit.script(_gelu)


@case("a torch.jit.script function", X(2, 6))
class ScriptedFunction(Two):
    def forward(self, x):
        return self.out(_scripted_gelu(self.b(_scripted_gelu(self.a(x)))))


@case("is_scripting, is_tracing, is_in_onnx_export, is_grad_enabled", X(2, 6))
class AsksSurroundings(Two):
    def forward(self, x):
        x = self.a(x)
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            return x
        if torch.is_grad_enabled() and x.requires_grad:
            x = x * 1.0
        return self.out(F.relu(self.b(x)))


@case("numpy numbers from dimensions", X(2, 5, 6))
class NumpyScale(Two):
    def forward(self, x):
        x = self.b(F.relu(self.a(x)))
        return self.out(x / np.sqrt(x.shape[-1])) * float(np.log(x.shape[1]))


@case("forward chosen in __init__", X(2, 6))
class ForwardChosen(Two):
    def __init__(self, fast=True):
        super().__init__()
        self.forward = self.forward_fast if fast else self.forward_slow

    def forward_fast(self, x):
        return self.out(F.relu(self.b(self.a(x))))

    def forward_slow(self, x):
        return self.out(self.b(self.a(x)))


@case("activation by functools.partial and by a lambda in a dict", X(2, 6))
class PartialActivation(Two):
    def __init__(self):
        super().__init__()
        self.acts = {"leaky": functools.partial(F.leaky_relu, negative_slope=0.2), "sq": lambda t: t.relu() ** 2}

    def forward(self, x):
        return self.out(self.acts["sq"](self.b(self.acts["leaky"](self.a(x)))))


def _checked(f):
    @functools.wraps(f)
    def inner(self, x, *args, **kwargs):
        if x.ndim != 2:
            raise ValueError("two dimensions")
        return f(self, x, *args, **kwargs)

    return inner


@case("a decorator around forward", X(2, 6))
class DecoratedForward(Two):
    @_checked
    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("try and except around an optional attribute; warnings", X(2, 6))
class TryExcept(Two):
    def forward(self, x):
        x = self.a(x)
        try:
            x = self.extra(x)
        except AttributeError:
            warnings.warn("no extra", stacklevel=1)
            x = F.relu(x)
        return self.out(self.b(x))


@case("a property that returns a computed weight", X(2, 6))
class WeightProperty(Two):
    @property
    def weight(self):
        return self.b.weight - self.b.weight.mean(dim=1, keepdim=True)

    def forward(self, x):
        return self.out(F.relu(F.linear(F.relu(self.a(x)), self.weight, self.b.bias)))


@case("__getattr__ that forwards to a wrapped module", X(2, 6))
class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = NoGradBranch()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def forward(self, x):
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@case("a subclass of Sequential with another forward", X(2, 6))
class ResidualSequential(nn.Module):
    class Res(nn.Sequential):
        def forward(self, x):
            for m in self[:-1]:
                x = x + torch.tanh(m(x))
            return self[-1](x)

    def __init__(self):
        super().__init__()
        self.a, self.body = nn.Linear(6, 8), ResidualSequential.Res(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(F.relu(self.body(self.a(x))))


@case("a loop over the rows of a tensor", X(2, 3, 6), batch=False)
class LoopOverRows(Two):
    def forward(self, x):
        h = 0
        for row in x.unbind(1):
            h = torch.tanh(self.a(row) + h)
        p, q = self.b(h)
        return self.out(p * q)


@case("unpacked channels: r, g, b by unbind and stack", X(2, 3, 5, 5))
class UnpackedChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 3), conv(3, 8), conv(8, 3)

    def forward(self, x):
        r, g, b = self.a(x).unbind(dim=1)
        y = 0.3 * r + 0.6 * g + 0.1 * b
        return self.out(F.relu(self.b(torch.stack([y, (b - y) * 0.5, (r - y) * 0.7], dim=1))))


@case("statistics as python floats: item() of a parameter", X(2, 6))
class ItemOfParameter(Two):
    def __init__(self):
        super().__init__()
        self.tau = nn.Parameter(torch.tensor(1.5), requires_grad=False)

    def forward(self, x):
        return self.out(F.relu(self.b(self.a(x))) / self.tau.item())


@case("branch on a python flag that a method sets", X(2, 6))
class FlagMethod(Two):
    def __init__(self):
        super().__init__()
        self.deploy = False
        self.set(True)

    def set(self, on):
        self.deploy = on

    def forward(self, x):
        return self.out(self.b(self.a(x)) if self.deploy else F.relu(self.a(x)))


@case(
    "noise added in eval too, seeded generator-free",
    X(2, 6),
    inexact_only=True,
    reason="random numbers of another shape after pruning",
)
class NoiseAlways(Two):
    def forward(self, x):
        x = self.a(x)
        return self.out(F.relu(self.b(x + 0.1 * torch.randn_like(x))))


@case("noise of one number per sample, broadcast over channels", X(2, 3, 5, 5), train=True)
class StyleNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.out = conv(3, 8), nn.Parameter(torch.zeros(1, 8, 1, 1)), conv(8, 3)

    def forward(self, x):
        x = self.a(x)
        n = torch.randn(x.size(0), 1, x.size(2), x.size(3), dtype=x.dtype, device=x.device)
        return self.out(F.leaky_relu(x + self.w * n, 0.2))


@case("sub-modules left in another mode than the root", X(4, 6))
class MixedModes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.d, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x):
        x = self.bn(self.a(x))
        if self.bn.training and not self.d.training:
            x = x * 2
        return self.out(F.relu(x))


@case("interpolate by ceil and int of sizes", X(2, 3, 7, 7), size=(X(2, 3, 9, 5),))
class CeilSizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), conv(8, 3)

    def forward(self, x):
        y = self.a(x)
        h, w = math.ceil(y.shape[2] / 2), int(y.shape[3] * 0.5) + 1
        y = F.interpolate(y, size=(h, w), mode="area")
        if x.shape[-1] % 2 == 0:
            y = y * 2
        return self.out(F.relu(y))


@case("autopad to a multiple of four, cropped at the end", X(2, 3, 6, 7), size=(X(2, 3, 8, 9),))
class PadToMultiple(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8, stride=2), nn.ConvTranspose2d(8, 6, 2, 2), conv(6, 3)

    def forward(self, x):
        h, w = x.shape[-2:]
        ph, pw = (4 - h % 4) % 4, (4 - w % 4) % 4
        y = F.pad(x, (0, pw, 0, ph), mode="reflect")
        return self.out(F.relu(self.b(F.relu(self.a(y)))))[..., :h, :w]


@case("nested functions and a recursion over levels", X(2, 3, 8, 8))
class RecursiveTree(nn.Module):
    def __init__(self, level=2, width=8):
        super().__init__()
        self.level = level
        self.c = conv(3 if level == 2 else width, width)
        self.sub = RecursiveTree(level - 1, width) if level > 0 else None
        self.out = conv(width, width if level < 2 else 3)

    def forward(self, x):
        def act(t):
            return F.silu(t) if self.level % 2 else F.relu(t)

        x = act(self.c(x))
        if self.sub is not None:
            x = x + F.interpolate(self.sub(F.avg_pool2d(x, 2)), scale_factor=2.0)
        return self.out(x)


@case("global and default arguments evaluated once", X(2, 6))
class DefaultTensor(Two):
    def forward(self, x, shift=torch.full((1, 8), 0.25, dtype=torch.float64)):  # noqa: B008
        return self.out(F.relu(self.b(self.a(x) + shift)))


@case("a constant tensor that is neither parameter nor buffer", X(2, 6))
class ConstantTensor(Two):
    def __init__(self):
        super().__init__()
        self.const = torch.linspace(0.5, 2, 8, dtype=torch.float64)

    def forward(self, x):
        return self.out(F.relu(self.b(self.a(x) * self.const)) + self.const)


@case("vmap over an ensemble of stacked weights", X(2, 6))
class VmapEnsemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w, self.out = nn.Linear(6, 8), nn.Parameter(torch.randn(3, 5, 8)), nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        y = torch.vmap(lambda w: F.linear(x, w))(self.w)
        return self.out(y.mean(0))
