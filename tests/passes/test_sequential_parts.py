"""The parts of sequential repair: the regression beside normal equations solved anew, drawn rows, paths that scale in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stp_fx
from stp_fx.rewrite import halves, regression
from stp_fx.rewrite.regression import Regression
from stp_fx.rewrite.residuals import in_place, pulled_back
from stp_fx.rewrite.sequential import reconstruct


def _ridge(x: torch.Tensor, r: torch.Tensor, ridge: float, scale: torch.Tensor, intercept: bool) -> torch.Tensor:
    """The solution [in, out] by least squares over the observations and one more row for each input."""
    if intercept:
        x, r = x - x.mean(0), r - r.mean(0)
    extra = torch.diag(scale * (ridge * len(x)) ** 0.5)
    return torch.linalg.lstsq(torch.cat([x, extra]), torch.cat([r, r.new_zeros(len(extra), r.shape[1])])).solution


def _loss(x: torch.Tensor, r: torch.Tensor, change: torch.Tensor, intercept: bool) -> float:
    if intercept:
        x, r = x - x.mean(0), r - r.mean(0)
    return float((r - x @ change).square().sum())


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("noise", [0.01, 3.0])
@pytest.mark.parametrize("inputs", [12, 150])
def test_the_fit_is_that_of_the_ridge_that_is_best_on_the_second_halves(intercept, noise, inputs):
    torch.manual_seed(0)
    sizes = (30, 7, 51, 1, 20)  # fewer than the larger number of inputs
    x = [torch.randn(n, inputs, dtype=torch.float64) @ torch.randn(inputs, inputs, dtype=torch.float64) + 1 for n in sizes]
    truth = torch.randn(inputs, 3, dtype=torch.float64)
    r = [each @ truth + noise * torch.randn(len(each), 3, dtype=torch.float64) * each.std() for each in x]
    fitted = Regression(inputs, intercept)
    for a, b in zip(x, r, strict=True):
        fitted.add(a[None], b[None], 1.0)
    fitted.reduce()
    found = fitted.fit()
    cuts = [15, 4, 26, 1, 10]
    first, second = (
        [torch.cat([e[:c] if k == 0 else e[c:] for e, c in zip(each, cuts, strict=True)]) for each in (x, r)] for k in (0, 1)
    )
    every_x, every_r = torch.cat(x), torch.cat(r)
    scale = every_x.std(0, correction=0) if intercept else every_x.square().mean(0).sqrt()
    losses = {k: _loss(*second, _ridge(*first, k, scale, intercept), intercept) for k in regression._RIDGES}
    best = min(losses, key=losses.__getitem__)
    expected = _ridge(every_x, every_r, best, scale, intercept)
    assert torch.allclose(found.change[0].T, expected, rtol=1e-7, atol=1e-9)
    if intercept:
        assert torch.allclose(found.shift[0], every_r.mean(0) - every_x.mean(0) @ expected)
    else:
        assert found.shift is None


@pytest.mark.parametrize("noise", [0.3, 30.0])
def test_the_ridge_for_many_outputs_is_nearly_the_best_on_all_of_them(noise):
    torch.manual_seed(0)
    inputs, outputs = 20, 300
    x = torch.randn(60, inputs, dtype=torch.float64) @ torch.randn(inputs, inputs, dtype=torch.float64)
    r = x @ torch.randn(inputs, outputs, dtype=torch.float64) + noise * torch.randn(60, outputs, dtype=torch.float64)
    fitted = Regression(inputs, intercept=True)
    fitted.add(x[None], r[None], 1.0)
    fitted.reduce()
    found = fitted.fit().change[0].T
    scale = x.std(0, correction=0)
    every = {k: _ridge(x, r, k, scale, True) for k in regression._RIDGES}
    (chosen,) = [k for k, change in every.items() if torch.allclose(change, found, rtol=1e-7, atol=1e-9)]
    losses = {k: _loss(x[30:], r[30:], _ridge(x[:30], r[:30], k, scale, True), True) for k in regression._RIDGES}
    assert losses[chosen] < 1.02 * min(losses.values()) < 1.02 * max(losses.values()) / 1.1


def test_a_product_with_itself_in_blocks(monkeypatch):
    monkeypatch.setattr(halves, "_BLOCK", 5)
    x = torch.randn(2, 9, 23, dtype=torch.float64)
    assert torch.allclose(halves._square(x), torch.einsum("gni,gnj->gij", x, x))


IMAGES = torch.randn(6, 8, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1


def _norm() -> nn.Module:
    norm = nn.BatchNorm2d(8).double().eval()
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(values, 0.2, 2)
    return norm


SCALING = {
    "norm": _norm(),
    "dropout": nn.Dropout(0.3).eval(),
    "layer scale": lambda x: x * torch.arange(1.0, 9).view(8, 1, 1).double(),
    "one weight a position": lambda x: x * (torch.arange(20.0).view(5, 4) + 1).double() - 3,
}
OTHERS = {
    "turned": lambda x: x.flip(2),
    "moved among samples": lambda x: x.flip(0),
    "moved among many samples": lambda x: x.roll(1, 0),
    "mixed": lambda x: x.cumsum(1),
    "bent": torch.relu,
    "other for each sample": lambda x: x * (torch.arange(len(x)).view(-1, 1, 1, 1) + 1),
    "other shape": lambda x: x.flatten(2),
    "not for two": lambda x: x.view(6, 8, 5, 4),
    "by its own statistics": lambda x: F.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("name", SCALING)
def test_a_path_that_scales_in_place_is_gone_back(name):
    way, wish = in_place(SCALING[name], IMAGES), torch.randn_like(IMAGES)
    start, strong = way.start(wish, lambda value: value, IMAGES.shape)
    assert bool(strong.all())
    assert torch.allclose(SCALING[name](start), wish)
    change, useful = pulled_back(SCALING[name], IMAGES, lambda end: wish - end)
    assert bool(useful.all())
    assert torch.allclose(IMAGES + change, start)


@pytest.mark.parametrize("name", OTHERS)
def test_a_path_that_does_more_is_told(name):
    assert in_place(OTHERS[name], IMAGES) is None


def test_channels_that_a_norm_makes_vanish_want_nothing():
    norm = _norm()
    nn.init.constant_(norm.weight[3:4].detach(), 1e-9)
    start, strong = in_place(norm, IMAGES).start(torch.ones_like(IMAGES), lambda value: value, IMAGES.shape)
    assert not bool(strong[:, 3].any())
    assert not bool(start[:, 3].any())
    assert bool(strong[:, :3].all())


def _network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    return nn.Sequential(*layers).double(), torch.randn(24, 3, 16, 16, dtype=torch.float64)


def test_a_part_of_the_positions_does_nearly_what_all_do(monkeypatch):
    model, x = _network()
    gm = stp_fx.trace(model, x[:1])
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, "magnitude", 0.5))
    new = torch.randn(64, 3, 16, 16, dtype=torch.float64)

    def error() -> float:
        repaired = stp_fx.apply_plan(reconstruct(gm, plan, x.split(8)).graph_module, plan)
        return float((repaired(new) - model(new)).detach().square().mean())

    seen: list[int] = []
    add = Regression.add
    monkeypatch.setattr(Regression, "add", lambda self, a, r, output: (seen.append(a.shape[1]), add(self, a, r, output))[1])
    every = error()
    assert max(seen) == 8 * 14 * 14
    monkeypatch.setattr(regression, "_ROWS", 300)
    monkeypatch.setattr(regression, "_PER_INPUT", 12)
    seen.clear()
    state = torch.get_rng_state()
    drawn = error()
    assert torch.equal(torch.get_rng_state(), state)
    assert max(seen) == 12 * 9 * 6 // 3 < 8 * 7 * 7
    assert drawn < 1.2 * every
    assert drawn == error()


def test_few_positions_of_unequal_batches_are_drawn_by_their_size(monkeypatch):
    model, x = _network()
    gm = stp_fx.trace(model, x[:1])
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, "magnitude", 0.5))
    monkeypatch.setattr(regression, "_ROWS", 400)
    monkeypatch.setattr(regression, "_PER_INPUT", 1)
    seen: list[int] = []
    add = Regression.add
    monkeypatch.setattr(Regression, "add", lambda self, a, r, output: (seen.append(a.shape[1]), add(self, a, r, output))[1])
    reconstruct(gm, plan, [x[:15], x[15:20]])
    assert set(zip(seen[::2], seen[1::2], strict=True)) == {(300, 100)}
