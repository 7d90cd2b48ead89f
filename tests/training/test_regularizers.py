"""Regularizers against loops over groups, their two forms against each other, and what all of them must keep to."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import stp_fx
from stp_fx import regularizers
from stp_fx.analysis.build import analyze
from stp_fx.analysis.sites import find_sites
from stp_fx.errors import InputError

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """A residual stream, a depthwise, a grouped and a transposed convolution, a concatenation, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.group = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up, self.shared = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 6, 1)
        self.mid, self.head = nn.Linear(14, 10), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.group(F.relu(self.depth(x)))
        y = self.shared(F.relu(self.shared(F.relu(self.up(x)))))
        return self.head(F.gelu(self.mid(torch.cat([x.mean((2, 3)), y.mean((2, 3))], 1))))


def traced(dtype: torch.dtype = torch.float64) -> fx.GraphModule:
    torch.manual_seed(0)
    gm = stp_fx.trace(Net().to(dtype), X[:2].to(dtype))
    with torch.no_grad():
        gm.get_parameter("norm.weight").copy_(torch.linspace(-1, 2, 8))
    return gm


NORMS = {"group_lasso": regularizers.GroupLasso, "weight_l21": regularizers.WeightL21, "bn_scale_l1": regularizers.BNScaleL1}


def by_loops(gm: fx.GraphModule, name: str) -> float:
    """The sum of norms, unit by unit and element by element."""
    total, parameters, seen = 0.0, dict(gm.named_parameters()), set()
    for group in analyze(gm).groups:
        for unit in range(group.size):
            squares = 0.0
            for member in group.members:
                axis = member.axis
                for position in member.index[member.unit == unit].tolist() if axis.tensor in parameters else ():
                    part = float(parameters[axis.tensor].detach().select(axis.dim, position).square().sum())
                    squares += part
                    output = axis.role == "weight" and axis.side in ("out", "both")
                    if (output if name == "weight_l21" else axis.role == "scale") and (axis.name, position) not in seen:
                        seen.add((axis.name, position))
                        total += math.sqrt(part) if name != "group_lasso" else 0.0
            total += math.sqrt(squares) if name == "group_lasso" else 0.0
    return total


@pytest.mark.parametrize("name", NORMS)
def test_the_loss_is_the_sum_of_norms(name: str) -> None:
    gm = traced()
    assert float(NORMS[name](0.3).loss(gm).detach()) == pytest.approx(0.3 * by_loops(gm, name), rel=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    gm = traced()
    NORMS[name](0.3).loss(gm).backward()
    expected = {k: None if p.grad is None else p.grad.clone() for k, p in gm.named_parameters()}
    for p in gm.parameters():
        p.grad = torch.ones_like(p)
    added = NORMS[name](0.3).apply_gradients(gm)
    assert added == pytest.approx(sum(float(g.abs().sum()) for g in expected.values() if g is not None), rel=1e-12)
    for key, p in gm.named_parameters():
        wanted = 1.0 if expected[key] is None else 1.0 + expected[key]
        assert torch.allclose(p.grad, wanted * torch.ones_like(p), rtol=1e-12, atol=1e-12), key


def test_weight_l21_knows_transposed_convolutions() -> None:
    gm = traced()
    regularizers.WeightL21(1.0).apply_gradients(gm)
    weight = gm.get_parameter("up.weight")  # [in, out, 2, 2]
    assert torch.allclose(weight.grad, weight / weight.detach().square().sum((0, 2, 3), keepdim=True).sqrt())


@pytest.mark.parametrize("name", NORMS)
def test_dead_units_do_not_count(name: str) -> None:
    gm = traced()
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    masked = stp_fx.apply_plan(gm, stp_fx.plan_of(pruned), mask=True)
    if name == "group_lasso":  # a living unit still meets dead ones: rows of dead channels are in its columns
        with torch.no_grad():
            for axis, kept in stp_fx.plan_of(pruned).kept.items():
                if axis[0] in dict(masked.named_parameters()):
                    gone = np.setdiff1d(np.arange(masked.get_parameter(axis[0]).shape[axis[1]]), kept)
                    masked.get_parameter(axis[0]).index_fill_(axis[1], torch.from_numpy(gone), 0.0)
    if name == "weight_l21":
        regularizers.WeightL21(1.0).apply_gradients(masked)
        dead = np.setdiff1d(np.arange(8), stp_fx.plan_of(pruned).kept["stem.weight", 0])
        assert len(dead)
        assert not masked.get_parameter("stem.weight").grad[dead].any()
        return
    loss = NORMS[name](1.0).loss(masked)
    assert float(loss.detach()) == pytest.approx(float(NORMS[name](1.0).loss(pruned).detach()), rel=1e-12)


@pytest.mark.parametrize("name", regularizers.known_regularizers())
def test_frozen_parameters_dtypes_and_groups(name: str) -> None:
    gm = traced(torch.bfloat16)
    gm.get_parameter("stem.weight").requires_grad_(False)
    before = {k: p.detach().clone() for k, p in gm.named_parameters()}
    regularizer = regularizers.resolve(name)
    regularizer.attach(gm)
    gm.train()(X.bfloat16()).sum().backward()
    gm(X.bfloat16())
    groups = [g for g in analyze(gm).groups if not any(m.axis.name == "mid.weight:0" for m in g.members)]
    baseline = {k: None if p.grad is None else p.grad.clone() for k, p in gm.named_parameters()}
    if "loss" in regularizer.forms:
        regularizer.loss(gm, groups).backward()
    else:
        if "gradients" in regularizer.forms:
            assert regularizer.apply_gradients(gm, groups) > 0.0
        regularizer.after_step(gm, groups)
    assert gm.get_parameter("stem.weight").grad is None
    assert torch.equal(gm.get_parameter("stem.weight"), before["stem.weight"])
    assert all(p.dtype == torch.bfloat16 for p in gm.parameters())
    if name not in ("variance_entropy",):  # what is upstream of an observed value gets a gradient from it
        assert torch.equal(gm.get_parameter("mid.bias").grad, baseline["mid.bias"])
        assert torch.equal(gm.get_parameter("mid.bias"), before["mid.bias"])
    fresh, other = regularizers.resolve(name), analyze(traced()).groups
    hook = {"loss": fresh.loss, "gradients": fresh.apply_gradients, "step": fresh.after_step}[regularizer.forms[0]]
    with pytest.raises(InputError, match="another graph"):
        hook(gm, other)


def test_growing_penalty() -> None:
    gm = traced()
    growing = regularizers.GrowingReg(0.1, ratio=0.5, every=2, ceiling=0.25)
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.5))
    strengths = []
    for _ in range(7):
        for p in gm.parameters():
            p.grad = None
        growing.apply_gradients(gm)
        gradient, weight = gm.get_parameter("mid.weight").grad, gm.get_parameter("mid.weight").detach()
        gone = np.setdiff1d(np.arange(10), plan.kept["mid.weight", 0])
        into = [0 if k in plan.kept["mid.weight", 1] else 1 for k in range(14)]
        expected = growing.strength * weight * (torch.tensor([float(k in gone) for k in range(10)])[:, None] + torch.tensor(into))
        assert torch.allclose(gradient, expected)
        strengths.append(growing.strength)
        growing.after_step(gm)
    assert strengths == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.25, 0.25, 0.25])
    again = regularizers.GrowingReg(0.1, ratio=0.5, every=2, ceiling=0.25)
    again.load_state_dict(growing.state_dict())
    gm.get_parameter("mid.weight").data.mul_(-3)  # the choice was made before
    for p in gm.parameters():
        p.grad = None
    again.apply_gradients(gm)
    assert again.strength == growing.strength
    assert not gm.get_parameter("mid.bias").grad[plan.kept["mid.weight", 0]].any()
    with pytest.raises(InputError, match="weights alone"):
        regularizers.GrowingReg(criterion="variance")


def pushed(growing: regularizers.GrowingReg, gm: fx.GraphModule) -> dict[int, float]:
    """By unit of the hidden layer: the factor of its bias that was added to the gradient."""
    gm.zero_grad()
    growing.apply_gradients(gm)
    bias = gm.get_parameter("mid.bias")
    assert bias.detach().abs().min() > 0
    return {k: x for k, x in enumerate((bias.grad / bias.detach()).tolist()) if x} if bias.grad is not None else {}


def test_a_growing_penalty_aimed_at_what_goes_next() -> None:
    gm = traced()
    growing = regularizers.GrowingReg(0.1, ratio=None, every=1, ceiling=0.35)
    assert growing.aims
    assert not regularizers.GrowingReg().aims
    with pytest.raises(InputError, match=r"call aim\(gm, plan\) first"):
        growing.apply_gradients(gm)
    plan_for = lambda gm, *units: stp_fx.analyze(gm).plan_for({"mid": list(units)})  # noqa: E731
    growing.aim(gm, plan_for(gm, 1, 4))
    assert pushed(growing, gm) == pytest.approx({1: 0.1, 4: 0.1})
    assert not any(p.grad[:1].any() for name, p in gm.named_parameters() if name.startswith("stem") and p.grad is not None)
    growing.after_step(gm)
    growing.aim(gm, plan_for(gm, 4, 6))  # scores have changed: 1 is let go, 6 begins
    assert pushed(growing, gm) == pytest.approx({4: 0.2, 6: 0.1})
    growing.after_step(gm)
    again = regularizers.GrowingReg(0.1, ratio=None, every=1, ceiling=0.35)
    again.load_state_dict(growing.state_dict())
    masked = stp_fx.apply_plan(gm, plan_for(gm, 4), mask=True, validate=False)
    for each in (growing, again):
        each.aim(masked, plan_for(gm, 4, 6, 7))  # a plan has masked units too
        assert pushed(each, masked) == pytest.approx({6: 0.2, 7: 0.1})
        assert each.strength == pytest.approx(0.2)
    small = stp_fx.apply_plan(gm, plan_for(gm, 4, 6, 7), validate=False)
    assert pushed(growing, small) == {}  # they are gone
    growing.aim(small, plan_for(small, 0))
    for _ in range(4):
        growing.after_step(small)
    assert pushed(growing, small) == pytest.approx({0: 0.35})
    growing.aim(small, None)
    assert pushed(growing, small) == {}
    assert growing.apply_gradients(small) == 0.0


def test_gradual_magnitude_pruning() -> None:
    gm = traced()
    gmp = regularizers.GMP(0.8, steps=10, every=2)
    for step in range(1, 13):
        with torch.no_grad():
            gm.get_parameter("stem.weight").add_(1e-3)  # what is zero stays zero, whatever the optimizer does
        gmp.after_step(gm)
        reached = 0.8 * (1 - (1 - min(10, step - step % 2) / 10) ** 3)
        for name in ("stem.weight", "up.weight", "mid.weight"):
            weight = gm.get_parameter(name)
            if step % 2 == 0:
                assert int((weight == 0).sum()) == int(reached * weight.numel())
    again = regularizers.GMP(0.8, steps=10, every=2)
    again.load_state_dict(copy.deepcopy(gmp.state_dict()))
    assert again.sparsity == gmp.sparsity == pytest.approx(0.8)
    gm.get_parameter("stem.weight").data.fill_(1.0)
    again.after_step(gm)
    assert int((gm.get_parameter("stem.weight") == 0).sum()) == int(0.8 * 8 * 27)


def entropies(gm: fx.GraphModule, values: dict[str, torch.Tensor]) -> float:
    total, seen = 0.0, set()
    for site in find_sites(gm).all:
        if not len(site.index) or (site.source, site.dim) in seen:
            continue
        seen.add((site.source, site.dim))
        value = values[site.source].transpose(0, site.dim).flatten(1)
        variance = [float(((row - row.mean()) ** 2).mean()) for row in value]
        for each in variance:
            p = each / sum(variance)
            total -= p * math.log(p) if p > 0 else 0.0
    return total


class Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.seen[n.name] = result.detach().clone()
        return result


def test_variance_entropy() -> None:
    gm = traced().train()
    recorder = Recorder(gm)
    recorder.seen = {}
    recorder.run(X)
    expected = entropies(gm, recorder.seen)
    keys, output = list(gm.state_dict()), gm(X)
    regularizer = regularizers.VarianceEntropy(0.5)
    with pytest.raises(InputError, match="attach"):
        regularizer.loss(gm)
    regularizer.attach(gm)
    regularizer.attach(gm)
    assert list(gm.state_dict()) == keys
    assert torch.equal(gm(X), output)
    loss = regularizer.loss(gm)
    assert float(loss.detach()) == pytest.approx(0.5 * expected, rel=1e-10)
    with pytest.raises(InputError, match="forward"):
        regularizer.loss(gm)  # it lets go of what it has read
    gm.eval()(X)
    with pytest.raises(InputError, match="train mode"):
        regularizer.loss(gm)
    gm.train()(X)
    copied = copy.deepcopy(gm)
    copied(X)
    assert float(regularizer.loss(copied).detach()) == pytest.approx(float(regularizer.loss(gm).detach()), rel=1e-10)
    regularizer.detach(gm)
    assert not any("observer" in name for name, _ in gm.named_modules())
    assert torch.equal(gm(X), output)


def test_the_gradient_of_variance_entropy() -> None:
    gm = traced().train()
    regularizer = regularizers.VarianceEntropy(1.0)
    regularizer.attach(gm)

    def loss() -> torch.Tensor:
        gm(X)
        return regularizer.loss(gm)

    weight = gm.get_parameter("depth.weight")
    loss().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight.add_(step * direction)
            gm.train()
        values.append(float(loss().detach()))
        with torch.no_grad():
            weight.sub_(step * direction)
    assert float((weight.grad * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_variance_entropy_under_masks_counts_what_lives() -> None:
    gm = traced()
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    masked = stp_fx.apply_plan(gm, stp_fx.plan_of(pruned), mask=True)
    losses = []
    for each in (pruned, masked):
        regularizer = regularizers.VarianceEntropy(1.0)
        regularizer.attach(each.train())
        each(X)
        losses.append(float(regularizer.loss(each).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("name", regularizers.known_regularizers())
@pytest.mark.parametrize("masks", [True, False])
def test_in_the_managers_loop(name: str, masks: bool) -> None:
    gm = traced(torch.float32)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01, momentum=0.9)
    pat = stp_fx.PATPassManager(
        gm,
        ratio=0.5,
        steps=2,
        start_epoch=1,
        optimizer=optimizer,
        mask_until_last=masks,
        regularizer=name,
        ignore=["mid.weight:0"],
    )
    amounts = []
    for epoch in range(4):
        pat.prune(epoch)
        pat.model.train()
        for _ in range(2):
            optimizer.zero_grad()
            loss, penalty = pat.model(X.float()).square().mean(), pat.loss()
            (loss + penalty).backward()
            amounts.append(float(penalty.detach()) + pat.regularize())
            optimizer.step()
    assert amounts[-4:] == [0.0] * 4  # the last step was at epoch 2
    assert name == "gmp" or all(amount > 0 for amount in amounts[:4])
    assert not any("observer" in key for key, _ in gm.named_modules())
    assert all(torch.isfinite(p).all() for p in gm.parameters())
    assert gm.get_parameter("stem.weight").shape[0] == 4


@pytest.mark.parametrize("wrong", ["lasso", regularizers.GroupLasso, 3])
def test_resolve_says_what_it_knows(wrong: Any) -> None:
    with pytest.raises(InputError, match="regularizer"):
        stp_fx.PATPassManager(traced(), regularizer=wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda: regularizers.GroupLasso(-1.0),
        lambda: regularizers.VarianceEntropy(float("nan")),
        lambda: regularizers.GrowingReg(every=0),
        lambda: regularizers.GMP(1.0),
        lambda: stp_fx.PATPassManager(traced(), regularizer="gmp"),
    ],
    ids=["strength", "nan", "every", "final", "no_optimizer"],
)
def test_bad_arguments(make: Any) -> None:
    with pytest.raises(InputError):
        make()
