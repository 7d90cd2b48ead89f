"""The laws of every regularizer: on random networks, under masks, under a change of the channels' order, in half precision."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import fx, nn

import stp_fx
from stp_fx import regularizers
from stp_fx.analysis.build import analyze
from stp_fx.analysis.groups import Axis
from stp_fx.analysis.sites import find_sites
from stp_fx.errors import InputError, NothingToPruneError
from stp_fx.testing import Recipe, Request, networks, requests, token_networks
from stp_fx.training.regularizers.entropy import _variance

PENALTIES = {"group_lasso": regularizers.GroupLasso, "weight_l21": regularizers.WeightL21, "bn_scale_l1": regularizers.BNScaleL1}
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

random_networks = settings(
    max_examples=25,
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


class Small(nn.Module):
    """Two hidden layers, a norm, a depthwise and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.depth, self.up = nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose2d(6, 5, 2)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.depth(self.norm(self.stem(x)).relu())).relu().mean((2, 3)))


def small(dtype: torch.dtype = torch.float64) -> fx.GraphModule:
    torch.manual_seed(0)
    gm = stp_fx.trace(Small().to(dtype), X[:2].to(dtype))
    with torch.no_grad():
        gm.get_parameter("norm.weight").copy_(torch.linspace(-1.5, 2, 6))
    return gm.train()


def counted(name: str, axis: Axis) -> bool:
    if name == "group_lasso":
        return True
    return axis.role == "scale" if name == "bn_scale_l1" else axis.role == "weight" and axis.side in ("out", "both")


def by_loops(gm: fx.GraphModule, name: str) -> float:
    """The sum of norms: of units (group lasso), or of single positions of axes."""
    parameters, units, positions = dict(gm.named_parameters(remove_duplicate=False)), {}, {}
    for group in analyze(gm).groups:
        for member in group.members:
            axis = member.axis
            if axis.tensor not in parameters or not counted(name, axis):
                continue
            for position, unit in zip(member.index.tolist(), member.unit.tolist(), strict=True):
                square = float(parameters[axis.tensor].detach().select(axis.dim, position).square().sum())
                units[group.index, unit] = units.get((group.index, unit), 0.0) + square
                positions[axis.tensor, axis.dim, position] = square
    return sum(map(math.sqrt, (units if name == "group_lasso" else positions).values()))


def gradients(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The gradients, zeros where there is none; then they are gone."""
    result = {}
    for name, p in gm.named_parameters():
        result[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        p.grad = None
    return result


def added_by(regularizer: Any, gm: fx.GraphModule) -> tuple[float, dict[str, torch.Tensor]]:
    gradients(gm)
    return regularizer.apply_gradients(gm), gradients(gm)


def acting(gm: fx.GraphModule) -> list[str]:
    """The penalties that have something to act on; the others must say that they have nothing."""
    result = []
    for name, make in PENALTIES.items():
        if by_loops(gm, name) > 0.0:
            result.append(name)
        else:
            with pytest.raises((InputError, NothingToPruneError), match="regularizer"):
                make(0.3).loss(gm)
    return result


@random_networks
@given(networks() | networks() | token_networks())
def test_the_forms_agree_with_loops_and_with_autograd(recipe: Recipe) -> None:
    gm = stp_fx.trace(recipe.build(), recipe.inputs())
    for name in acting(gm):
        gradients(gm)
        loss = PENALTIES[name](0.3).loss(gm)
        assert float(loss.detach()) == pytest.approx(0.3 * by_loops(gm, name), rel=1e-11, abs=1e-11)
        loss.backward()
        expected = gradients(gm)
        added, found = added_by(PENALTIES[name](0.3), gm)
        assert added == pytest.approx(sum(float(g.abs().sum()) for g in expected.values()), rel=1e-10)
        for key, gradient in found.items():
            assert torch.allclose(gradient, expected[key], rtol=1e-10, atol=1e-10), (name, key)


def left(gm: fx.GraphModule, plan: stp_fx.PrunePlan) -> dict[str, int]:
    """By group: how many units have a position that ``plan`` keeps."""
    result = {}
    for group in analyze(gm).groups:
        units = set()
        for member in group.members:
            kept = plan.kept.get((member.axis.tensor, member.axis.dim), np.arange(member.axis.size))
            units.update(member.unit[np.isin(member.index, kept)].tolist())
        result[group.name] = len(units)
    return result


@random_networks
@given(networks() | networks() | token_networks(), requests())
def test_a_masked_network_has_the_penalties_of_the_removed_one(recipe: Recipe, request: Request) -> None:
    gm = stp_fx.trace(recipe.build(), recipe.inputs())
    if not analyze(gm).groups or any(isinstance(module, nn.RMSNorm) for module in gm.modules()):
        return  # removal scales the weight of an RMSNorm by the root of the number of channels, so its penalty is another
    scores = stp_fx.criteria.Random(seed=request.seed)
    pruned = stp_fx.prune_graph(gm, scores, request.ratio, scope=request.scope, products=request.products)
    plan = stp_fx.plan_of(pruned)
    if plan.is_empty or {group.name: group.size for group in analyze(pruned).groups} != left(gm, plan):
        return  # the last unit of a group, or of a piece of a split, is none any more: it cannot go
    masked = stp_fx.apply_plan(gm, plan, mask=True)
    for name in acting(pruned):
        added, expected = added_by(PENALTIES[name](0.3), pruned)
        same, found = added_by(PENALTIES[name](0.3), masked)
        assert same == pytest.approx(added, rel=1e-10), name
        for key, gradient in found.items():
            for (tensor, dim), kept in plan.kept.items():
                if tensor == key:
                    dead = torch.from_numpy(np.setdiff1d(np.arange(gradient.shape[dim]), kept))
                    assert not gradient.index_select(dim, dead).any(), (name, key)
            for (tensor, dim), kept in plan.kept.items():
                if tensor == key:
                    gradient = gradient.index_select(dim, torch.from_numpy(kept))
            assert torch.allclose(gradient, expected[key], rtol=1e-10, atol=1e-10), (name, key)


def permuted(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The same function with the hidden channels in another order, and what brings a tensor into it."""
    first, second = torch.randperm(6, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 0, 4, 1, 2])
    orders = {
        **dict.fromkeys(
            ["stem.weight", "stem.bias", "norm.weight", "norm.bias", "depth.weight", "depth.bias"], lambda t: t[first]
        ),
        "up.weight": lambda t: t[first][:, second],
        "up.bias": lambda t: t[second],
        "head.weight": lambda t: t[:, second],
        "head.bias": lambda t: t,
    }
    result = copy.deepcopy(gm)
    with torch.no_grad():
        for name, p in result.named_parameters():
            p.copy_(orders[name](p.clone()))
    return result, orders


@pytest.mark.parametrize("name", regularizers.known_regularizers())
def test_the_order_of_channels_does_not_matter(name: str) -> None:
    gm = small()
    other, orders = permuted(gm)
    results = []
    for each in (gm, other):
        regularizer = regularizers.resolve(name)
        regularizer.attach(each)
        each(X)
        if "loss" in regularizer.forms:
            regularizer.loss(each).backward()
        if "gradients" in regularizer.forms:
            regularizer.apply_gradients(each)
        for _ in range(10):
            regularizer.after_step(each)
        results.append({k: (p.detach(), each.get_parameter(k).grad) for k, p in each.named_parameters()})
    for key, (weight, gradient) in results[0].items():
        assert torch.allclose(orders[key](weight), results[1][key][0], rtol=1e-10, atol=1e-12), key
        if gradient is not None:
            assert torch.allclose(orders[key](gradient), results[1][key][1], rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_changes_the_dtype(name: str, dtype: torch.dtype) -> None:
    gm = small(dtype)
    with torch.no_grad():
        for p in gm.parameters():
            p.mul_(1e-4)
    added, found = added_by(PENALTIES[name](10.0), gm)
    PENALTIES[name](10.0).loss(gm).backward()
    assert math.isfinite(added)
    for key, gradient in gradients(gm).items():
        assert found[key].dtype == dtype
        assert torch.allclose(found[key], gradient, rtol=1e-2, atol=1e-2), key
    assert any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("name", ["group_lasso", "weight_l21", "growing"])
def test_frozen_parameters_are_left_alone_and_still_count(name: str) -> None:
    gm = small()
    _, whole = added_by(regularizers.resolve(name), gm)
    gm.get_parameter("depth.weight").requires_grad_(False)
    _, found = added_by(regularizers.resolve(name), gm)
    assert whole["depth.weight"].any()
    assert not found["depth.weight"].any()
    assert torch.equal(found["stem.weight"], whole["stem.weight"])


def test_a_sparse_gradient_is_refused_before_anything_is_added() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.table, self.head = nn.Linear(3, 6), nn.Embedding(5, 6, sparse=True), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
            return self.head(self.first(x) + self.table(i))

    inputs = (torch.randn(4, 3), torch.arange(4))
    gm = stp_fx.trace(Words(), inputs)
    gm(*inputs).sum().backward()
    before = gm.get_parameter("first.weight").grad.clone()
    with pytest.raises(InputError, match=r"'table.weight'.*sparse"):
        regularizers.GroupLasso(1.0).apply_gradients(gm)
    assert torch.equal(gm.get_parameter("first.weight").grad, before)


def test_the_graph_of_a_forward_ends_with_the_loss() -> None:
    gm, regularizer = small(), regularizers.VarianceEntropy(1.0)
    regularizer.attach(gm)
    groups = analyze(gm).groups
    assert len(groups) > 1
    gm(X)
    observers = [m for n, m in gm.named_children() if "observer" in n]
    held = [weakref.ref(observer.variance) for observer in observers]
    assert len(held) > 1
    loss = regularizer.loss(gm, groups[:1])  # the others have been observed as well
    loss.backward()
    del loss
    gc.collect()
    assert all(ref() is None for ref in held)
    assert all(observer.variance is None for observer in observers)


def test_one_value_observed_along_two_dimensions() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.channels, self.across = nn.Conv1d(2, 4, 1), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.across(self.channels(x).tanh()).sum((1, 2))

    torch.manual_seed(0)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    gm = stp_fx.trace(Sums().double(), x).train()
    assert {(s.source, s.dim) for s in find_sites(gm).all if len(s.index)} == {("across", 1), ("across", 2)}
    value, expected = gm.across(gm.channels(x).tanh()).detach(), 0.0
    for dim in (1, 2):
        variance = value.var([k for k in range(3) if k != dim], correction=0)
        expected -= float((variance / variance.sum() * (variance / variance.sum()).log()).sum())
    regularizer = regularizers.VarianceEntropy(1.0)
    regularizer.attach(gm)
    gm(x)
    assert float(regularizer.loss(gm).detach()) == pytest.approx(expected, rel=1e-10)


def test_the_variance_has_the_gradient_of_torch_var() -> None:
    for shape, dim in (((3, 4), 1), ((2, 5, 3, 4), 1), ((2, 6, 5), 2)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        others = [k for k in range(len(shape)) if k != dim]
        assert torch.allclose(_variance(x, dim), x.var(others, correction=0), rtol=1e-12)
        assert torch.autograd.gradcheck(lambda t, dim=dim: _variance(t, dim), x)


def test_what_gmp_has_set_to_zero_stays_zero() -> None:
    gm, gmp = small(), regularizers.GMP(0.6, steps=6, every=2)
    weight, zero = gm.get_parameter("stem.weight"), torch.zeros(6, 3, 3, 3, dtype=torch.bool)
    for _ in range(8):
        with torch.no_grad():
            weight[zero] = 5.0  # an optimizer with momentum
        gmp.after_step(gm)
        assert not weight[zero].any()
        zero = weight == 0
    assert int(zero.sum()) == int(0.6 * weight.numel())


def test_gmp_under_a_mask_chooses_as_if_the_dead_were_gone() -> None:
    gm = small()
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    plan = stp_fx.plan_of(pruned)
    masked = stp_fx.apply_plan(gm, plan, mask=True)
    for each in (pruned, masked):
        regularizers.GMP(0.5, steps=1, every=1).after_step(each)
    weight = masked.get_parameter("up.weight").detach()
    for dim in (0, 1):
        weight = weight.index_select(dim, torch.from_numpy(plan.kept["up.weight", dim]))
    assert torch.equal(weight, pruned.get_parameter("up.weight"))
    assert (weight == 0).any()


def test_gmp_goes_on_from_a_state_and_after_removal() -> None:
    gm, gmp = small(), regularizers.GMP(0.6, steps=10, every=5)
    for _ in range(6):
        gmp.after_step(gm)
    twin, again = copy.deepcopy(gm), regularizers.GMP(0.6, steps=10, every=5)
    again.load_state_dict(copy.deepcopy(gmp.state_dict()))
    for each, regularizer in ((gm, gmp), (twin, again)):
        for _ in range(5):
            regularizer.after_step(each)
    assert torch.equal(gm.get_parameter("up.weight"), twin.get_parameter("up.weight"))
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    gmp.after_step(pruned)
    weight = pruned.get_parameter("up.weight")
    assert int((weight == 0).sum()) >= int(0.6 * weight.numel())


@pytest.mark.parametrize("make", [regularizers.GMP, regularizers.GrowingReg])
@pytest.mark.parametrize("state", [{}, {"steps": 1}, {"steps": 1, "other": 2}, 3], ids=["none", "half", "other", "number"])
def test_a_state_of_something_else_is_refused(make: Any, state: Any) -> None:
    with pytest.raises(InputError, match="steps"):
        make().load_state_dict(state)
