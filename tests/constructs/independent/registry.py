"""What a construct is: a module class, its inputs, and how its weights are drawn."""

import zlib
from dataclasses import dataclass, field

import torch
from torch import nn

CASES: dict[str, "Case"] = {}


@dataclass(frozen=True)
class Spec:
    """One input tensor: its shape, its kind, and whether its first dimension is the batch."""

    shape: tuple
    kind: str = "real"
    high: int = 2
    batched: bool = True


def X(*shape, batched=True):
    """A tensor of normal numbers."""
    return Spec(shape, batched=batched)


def P(*shape):
    """A tensor of positive numbers."""
    return Spec(shape, "positive")


def ints(high, *shape, batched=True):
    """A tensor of indices below `high`."""
    return Spec(shape, "int", high, batched)


def bools(*shape, batched=True):
    """A tensor of truth values, the first of every row true."""
    return Spec(shape, "bool", batched=batched)


def draw(spec, gen, extra=0):
    """The value of an input spec, with `extra` more in the batch."""
    if isinstance(spec, (list, tuple)):
        return type(spec)(draw(s, gen, extra) for s in spec)
    if isinstance(spec, dict):
        return {k: draw(s, gen, extra) for k, s in spec.items()}
    if not isinstance(spec, Spec):
        return spec
    shape = (spec.shape[0] + extra, *spec.shape[1:]) if spec.batched and spec.shape else spec.shape
    if spec.kind == "int":
        return torch.randint(0, spec.high, shape, generator=gen)
    if spec.kind == "bool":
        out = torch.rand(shape, generator=gen) > 0.4
        out[..., 0] = True
        return out
    out = torch.randn(shape, generator=gen, dtype=torch.float64)
    return out.abs() + 0.1 if spec.kind == "positive" else out


def randomise(model, seed):
    """Draws every parameter and every norm statistic anew, none of them trivial."""
    gen = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if not p.is_floating_point():
            continue
        new = torch.randn(p.shape, generator=gen, dtype=torch.float64)
        fan = max(1, p[0].numel()) if p.dim() > 1 else 1
        p.data.copy_(new / fan**0.5 if p.dim() > 1 else new * 0.3 + 0.2)
    for m in model.modules():
        weight = m._parameters.get("weight")
        if weight is not None and weight.dim() == 1 and "Norm" in type(m).__name__:
            weight.data.copy_(torch.rand(weight.shape, generator=gen, dtype=torch.float64) + 0.5)
        if getattr(m, "running_var", None) is not None:
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=gen, dtype=torch.float64) + 0.5)
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=gen, dtype=torch.float64) * 0.3)
    return model


@dataclass(frozen=True)
class Case:
    """A construct: how to build it, what goes in, and which checks mean something."""

    name: str
    cause: str
    cls: type
    inputs: tuple
    size: tuple | None = None
    batch: bool = True
    kwargs: dict = field(default_factory=dict)
    keep: tuple = ()
    fill: dict = field(default_factory=dict)
    reason: str = ""
    train: bool = True
    inexact_only: bool = False

    def model(self):
        """The module, the same at every call."""
        seed = zlib.crc32(self.name.encode()) % 100000
        torch.manual_seed(seed)
        model = randomise(self.cls().double(), seed)
        return model.eval()

    def args(self, which="example"):
        """Inputs: "example", "batch" (one more) or "size" (another size); None where there are none."""
        gen = torch.Generator().manual_seed({"example": 1, "batch": 2, "size": 3}[which])
        if which == "size":
            return None if self.size is None else (draw(self.size, gen), draw(self.kwargs, gen))
        if which == "batch" and not self.batch:
            return None
        extra = 1 if which == "batch" else 0
        return draw(self.inputs, gen, extra), draw(self.kwargs, gen, extra)


def case(cause, *inputs, **options):
    """Registers the class below as a construct."""

    def register(cls):
        if cls.__name__ in CASES:
            raise ValueError(f"{cls.__name__} is there twice")
        CASES[cls.__name__] = Case(cls.__name__, cause, cls, inputs, **options)
        return cls

    return register


def conv(i, o, k=3, **kw):
    """A convolution that keeps the size."""
    return nn.Conv2d(i, o, k, padding=k // 2, **kw)
