"""Every entry against numbers: what a rule says of a sample is held against the op run on real tensors.

A rule maps positions of input axes to positions of output axes. The inputs are drawn anew at one position of one axis. Only
output positions that carry the same element may change, unless the axis is pinned, summed over, or noted as inexact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stp_fx.analysis.solve import Solution, solve
from stp_fx.rules import Dim, FactorMapping, OpCall, entry_of, registered, tensors_in
from stp_fx.rules.registry import Rule, overload_of
from stp_fx.rules.samples import Sample
from stp_fx.rules.zeros import _OF_ONE

from .bench import Bench, samples

_SAMPLES = {f"{op}#{label}".rstrip("#"): (op, sample) for op, label, sample in samples()}


class Numbers:
    """Makes the tensors of a sample: numbers between 0.1 and 0.9; ``redrawn`` (tensor, dim, position) has others."""

    device = torch.device("cpu")

    def __init__(self, redrawn: tuple[int, int, int] | None = None) -> None:
        self.draws, self.others = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
        self.redrawn, self.count = redrawn, 0

    def _draw(self, shape: tuple[int, ...], dtype: torch.dtype, below: int, generator: torch.Generator) -> torch.Tensor:
        if dtype.is_floating_point:
            return torch.rand(shape, dtype=dtype, generator=generator) * 0.8 + 0.1
        return torch.randint(below, shape, generator=generator).to(dtype)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, below: int = 2) -> torch.Tensor:
        dtype = dtype or torch.float64
        tensor = self._draw(shape, dtype, below, self.draws)
        if self.redrawn is not None and self.redrawn[0] == self.count:
            _, dim, position = self.redrawn
            other = ~tensor if dtype is torch.bool else self._draw(shape, dtype, below, self.others)
            tensor.select(dim, position).copy_(other.select(dim, position))
        self.count += 1
        return tensor

    def index(self, *shape: int, below: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=self.draws)


def results(op: str, sample: Sample, redrawn: tuple[int, int, int] | None = None) -> list[np.ndarray]:
    """The op's results on numbers; random ops draw the same each time."""
    values, named = sample(Numbers(redrawn))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return [t.clone().numpy() for t in tensors_in(overload_of(op)(*values, **named))]


class Claims:
    """What a rule says of a sample, in classes of elements."""

    def __init__(self, op: str, sample: Sample, rule: Rule) -> None:
        bench = Bench()
        values, named = sample(bench)
        self.outs = [bench.run.dims(t) for t in tensors_in(bench.apply(op, values, named, rule))]
        self.made = bench.made
        elements = bench.run.elements
        self.solution: Solution = solve(elements)
        self.parts: dict[int, set[int]] = {}
        for product in self.solution.products:
            for at, label in np.ndenumerate(product.classes):
                factors = {int(factor[k]) for factor, k in zip(product.factors, at, strict=True)}
                self.parts.setdefault(int(label), set()).update(*map(self.closure, factors))
        noted = [n.ids.ravel() for n in (*elements.notes, *elements.exclusions)]
        summed = [f.ids for c in bench.run.result.contractions for dim in c.contracted for f in dim if f.ids is not None]
        self.free = {part for ids in (*noted, *summed) for k in ids for part in self.closure(self.label(k))}

    def label(self, element: Any) -> int:
        return int(self.solution.label[int(element)])

    def closure(self, label: int) -> set[int]:
        """A class and the factors that it is a product of."""
        return {label, *self.parts.get(label, ())}

    def carried(self, dim: Dim) -> list[set[int]]:
        """The classes that each position of a dimension carries."""
        found: list[set[int]] = [set()]
        for factor in dim:
            each = [set() if factor.ids is None else self.closure(self.label(factor.ids[k])) for k in range(factor.size)]
            found = [outer | inner for outer in found for inner in each]
        return found

    def families(self, dim: Dim) -> list[list[int]]:
        """The class of each position: of the axis itself, or of each factor where it is a product."""
        labels = [self.label(k) for k in dim[0].ids]  # type: ignore[union-attr]
        product = next((p for p in self.solution.products if set(labels) <= set(p.classes.ravel().tolist())), None)
        if product is None:
            return [labels]
        places = [tuple(np.argwhere(product.classes == label)[0]) for label in labels]
        return [[int(factor[at[k]]) for at in places] for k, factor in enumerate(product.factors)]


def disagreements(op: str, sample: Sample, rule: Rule) -> list[str]:
    """Where a result changes although the rule says that it does not depend on what was redrawn."""
    claims, base, found = Claims(op, sample, rule), results(op, sample), []
    for tensor, dims in enumerate(claims.made):
        for k, dim in enumerate(dims):
            for family in claims.families(dim) if dim else ():
                if any(label in claims.free or claims.solution.pinned[label] for label in family):
                    continue
                for position, label in enumerate(family):
                    changed = [a != b for a, b in zip(base, results(op, sample, (tensor, k, position)), strict=True)]
                    for number, flags in _unclaimed(claims, changed, set(family), label):
                        found.append(
                            f"{op}: result {number} at {np.argwhere(flags)[0]} depends on tensor {tensor}[{k}] = {position}"
                        )
    return found


def _unclaimed(claims: Claims, changed: list[np.ndarray], family: set[int], label: int) -> list[tuple[int, np.ndarray]]:
    """Changes of results where their dimensions of ``family`` do not carry ``label``."""
    carried = [[claims.carried(dim) for dim in dims] for dims in claims.outs]
    somewhere = any(family & set().union(*positions) for dims in carried for positions in dims)
    found = []
    for number, (flags, dims) in enumerate(zip(changed, carried, strict=True)):
        if flags.size == 0:
            continue
        if somewhere and not any(set().union(*positions) for positions in dims):
            continue  # a result of which the rule says nothing, as an index or a random state
        allowed = np.zeros(flags.shape, dtype=bool)
        for axis, positions in enumerate(dims):
            mine = np.array([label in each for each in positions])
            if family & set().union(*positions):
                allowed |= mine.reshape([-1 if k == axis else 1 for k in range(flags.ndim)])
        if (flags & ~allowed).any():
            found.append((number, flags & ~allowed))
    return found


@pytest.mark.parametrize("name", _SAMPLES)
def test_a_rule_agrees_with_numbers(name: str) -> None:
    op, sample = _SAMPLES[name]
    entry = entry_of(overload_of(op))
    assert entry is not None
    if entry.unchecked == "no CPU kernel":
        with pytest.raises((NotImplementedError, RuntimeError, torch._dynamo.exc.Unsupported)):
            results(op, sample)
    elif not entry.unchecked:
        assert disagreements(op, sample, registered()[op]) == []


def test_reasons_for_no_check_are_few() -> None:
    reasons = {entry.unchecked for entry in map(entry_of, map(overload_of, (op for op, _ in _SAMPLES.values()))) if entry}
    single = "its kernels take single precision alone"
    assert "" in reasons  # not every torch has an op for each of the others
    assert reasons <= {"", "no CPU kernel", "its values are arbitrary", "its matrix is sparse", single}


# -- zeros ---------------------------------------------------------------------------------------------------------------


class Zeros(Numbers):
    """Makes floating tensors of zeros."""

    def _draw(self, shape: tuple[int, ...], dtype: torch.dtype, below: int, generator: torch.Generator) -> torch.Tensor:
        drawn = super()._draw(shape, dtype, below, generator)
        return torch.zeros_like(drawn) if dtype.is_floating_point else drawn


@pytest.mark.parametrize("name", [n for n, (op, _) in _SAMPLES.items() if (e := entry_of(overload_of(op))) and e.keeps_zero])
def test_an_op_that_is_said_to_keep_zeros_does(name: str) -> None:
    op, sample = _SAMPLES[name]
    values, named = sample(Zeros())
    outs = [t for t in tensors_in(overload_of(op)(*values, **named)) if t.is_floating_point()]
    assert all((t == 0).all() for t in outs)


@pytest.mark.parametrize("name", sorted(_OF_ONE))
def test_a_pointwise_function_that_is_said_to_keep_zeros_does(name: str) -> None:
    function = getattr(torch.ops.aten, name)
    assert (function(torch.zeros(3, dtype=torch.float64)) == 0).all()


# -- the check has teeth -------------------------------------------------------------------------------------------------


def as_if_pointwise(call: OpCall) -> None:
    """The first operand's factors, whatever the op does."""
    call.assign(call.out, call.dims(call.args[0]))


def dropped(call: OpCall) -> None:
    """The factors that are left, with no word on those that are not."""
    call.assign(call.out, tuple(d for d in call.dims(call.args[0]) if d)[: call.out.dim()])


def untied(pattern: str) -> Callable[[OpCall], None]:
    """A mapping of the first operand alone."""
    mapping = FactorMapping(pattern, products=())
    return lambda call: mapping.apply(call, [call.args[0]], call.outs) and None


WRONG: dict[str, tuple[str, Rule]] = {
    "an order of channels": ("aten.flip.default", as_if_pointwise),
    "a shift": ("aten.roll.default", as_if_pointwise),
    "a softmax that is called exact": ("aten._softmax.default", as_if_pointwise),
    "a running sum": ("aten.cumsum.default", as_if_pointwise),
    "a sort": ("aten.argsort.default", as_if_pointwise),
    "a sum over nothing": ("aten.sum.default", dropped),
    "indices without channels": ("aten.max_unpool2d.default", untied(".. _ _ -> .. _ _")),
    "a product that is not summed": ("aten.mm.default", FactorMapping("m k, k n -> m n", products=())),
    "groups in the wrong order": (
        "aten.convolution.default",
        FactorMapping("n (c g) *, (o g) c *, (o g) -> n (o g) *", sizes={"g": "groups"}),
    ),
}


@pytest.mark.parametrize(("op", "rule"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_rule_disagrees(op: str, rule: Rule) -> None:
    _, sample = _SAMPLES[op]
    assert disagreements(op, sample, registered()[op]) == []
    assert disagreements(op, sample, rule) != []
