"""Small networks with everything that criteria meet, and what a person knows of them: who reads which units where."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import stp_fx
from stp_fx.analysis.groups import Group
from stp_fx.criteria import Criterion, ScoreContext, score_groups
from stp_fx.measure.gradients import Gradients, collect_gradients
from stp_fx.measure.statistics import collect_statistics

CLASSES = 4


class ConvNet(nn.Module):
    """A residual block with BatchNorm; the stream ends flattened, so that a unit has four positions there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(24, CLASSES)
        for norm in (self.norm, self.inner_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner_norm(self.inner(x))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    """Heads, a LayerNorm and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.join = nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (part(y).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, CLASSES))


SHAPES: Mapping[type[nn.Module], tuple[int, ...]] = {ConvNet: (3, 6, 6), Attention: (6, 5), Mlp: (5,)}

# Group: (module whose input is the site, positions of unit u there).
Readers = Mapping[str, Sequence[tuple[str, Callable[[int], list[int]]]]]
CONV_READERS: Readers = {
    "stem.weight:0": [("inner", lambda u: [u]), ("head", lambda u: [4 * u, 4 * u + 1, 4 * u + 2, 4 * u + 3])],
    "inner.weight:0": [("outer", lambda u: [u])],
}


@dataclasses.dataclass(eq=False)
class Case:
    """A traced network with calibration data, and what the library measured on it."""

    model: nn.Module
    gm: fx.GraphModule
    batches: list[tuple[Tensor, Tensor]]
    context: ScoreContext

    @property
    def groups(self) -> tuple[Group, ...]:
        return stp_fx.analyze(self.gm).groups

    def scores(self, criterion: Criterion) -> dict[str, list[float]]:
        found = score_groups(self.groups, criterion, dataclasses.replace(self.context, cache={}))
        return {group.name: values.tolist() for group, values in zip(self.groups, found, strict=True)}


def build(kind: type[nn.Module], dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().to(dtype).eval()


def calibration(kind: type[nn.Module], dtype: torch.dtype = torch.float64, batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(7)
    shape = (8, *SHAPES[kind])
    return [
        (torch.randn(shape, generator=draws).to(dtype), torch.randint(0, CLASSES, (8,), generator=draws)) for _ in range(batches)
    ]


def traced(kind: type[nn.Module], dtype: torch.dtype = torch.float64, model: nn.Module | None = None) -> fx.GraphModule:
    model = build(kind, dtype) if model is None else model
    return stp_fx.trace(copy.deepcopy(model), torch.zeros(2, *SHAPES[kind], dtype=dtype))


def measured(kind: type[nn.Module], model: nn.Module | None = None) -> Case:
    """Everything that any criterion needs, in double precision."""
    model = build(kind) if model is None else model
    gm, batches = traced(kind, model=model), calibration(kind)
    tensors = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    statistics = collect_statistics(gm, batches, covariance=True)
    found = collect_gradients(gm, batches, fisher=True)
    # A diagonal with negative entries, as Hutchinson's estimate has them.
    draws = torch.Generator().manual_seed(3)
    hessian = {name: torch.randn(g.shape, generator=draws, dtype=g.dtype) for name, g in found.mean.items()}
    gradients = Gradients(found.mean, found.fisher, hessian)
    return Case(model, gm, batches, ScoreContext(tensors, 0, gm, statistics, gradients))
