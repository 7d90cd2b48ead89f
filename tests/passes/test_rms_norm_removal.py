"""Removal over RMSNorm's own axis is masking, however the norm is called and whatever scale it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import fx, nn

import stp_fx
from stp_fx.analysis.sites import find_sites
from stp_fx.io import prune_shards

WIDTH = 12
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Residual(nn.Module):
    """A stream that is normalised twice; ``call`` is the first norm, which may use the stored tensors of its module."""

    def __init__(self, call: Callable[[Residual, torch.Tensor], torch.Tensor], *, affine: bool = True) -> None:
        super().__init__()
        self.into, self.inner, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.norm, self.last = nn.RMSNorm(WIDTH, 1e-2, affine), nn.RMSNorm(WIDTH, 1e-1)
        self.scale, self.call = nn.Parameter(torch.rand(WIDTH)), call
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        x = x + self.inner(self.call(self, x))
        return self.out(self.last(x))


EXACT: dict[str, Callable[[], Residual]] = {
    "module": lambda: Residual(lambda net, x: net.norm(x)),
    "module without a scale": lambda: Residual(lambda net, x: net.norm(x), affine=False),
    "one module twice": lambda: Residual(lambda net, x: net.last(x)),
    "function": lambda: Residual(lambda net, x: F.rms_norm(x, (WIDTH,), net.scale, eps=1e-2)),
    "function, epsilon by position": lambda: Residual(lambda net, x: F.rms_norm(x, (WIDTH,), net.scale, 1e-2)),
    "function without a scale": lambda: Residual(lambda net, x: torch.rms_norm(x, (WIDTH,), None, 1e-2)),
    "computed scale": lambda: Residual(lambda net, x: F.rms_norm(x, (WIDTH,), net.scale.exp(), 1e-2)),
    "scale that others read": lambda: Residual(lambda net, x: F.rms_norm(x, (WIDTH,), net.scale, 1e-2) * net.scale),
    "epsilon of the dtype": lambda: Residual(lambda net, x: F.rms_norm(x, (WIDTH,), net.scale)),
}


def captured(name: str, frontend: str = "fx") -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    model = EXACT[name]().double().eval()
    return model, stp_fx.trace(model, X, frontend=frontend)


@pytest.mark.parametrize("frontend", ["fx", "export"])
@pytest.mark.parametrize("name", EXACT)
def test_removing_is_masking(name: str, frontend: str) -> None:
    _, gm = captured(name, frontend)
    graph = stp_fx.analyze(gm)
    (group,) = graph.groups
    assert group.exact, group.notes
    assert group.size == WIDTH
    for removed in ([0, 3, 4], [1]):  # the second from what is left of the first
        plan = stp_fx.analyze(gm).plan_for({"into": removed})
        smaller, masked = stp_fx.apply_plan(gm, plan), stp_fx.apply_plan(gm, plan, mask=True)
        assert (masked(X) - gm(X)).abs().max() > 1e-3
        torch.testing.assert_close(smaller(X), masked(X), rtol=1e-12, atol=1e-12)
        gm = smaller


def test_all_at_once_is_one_after_the_other() -> None:
    _, gm = captured("module")
    first = stp_fx.apply_plan(gm, stp_fx.analyze(gm).plan_for({"into": [0, 3, 4]}))
    then = stp_fx.apply_plan(first, stp_fx.analyze(first).plan_for({"into": [0]}))
    at_once = stp_fx.apply_plan(gm, stp_fx.analyze(gm).plan_for({"into": [0, 1, 3, 4]}))
    torch.testing.assert_close(then(X), at_once(X), rtol=1e-12, atol=1e-12)
    assert at_once.norm.eps == pytest.approx(1e-2 * 12 / 8)
    assert gm.norm.eps == 1e-2


def test_a_norm_over_two_dimensions_stays_inexact() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.norm, self.out = nn.Conv1d(2, 6, 1), nn.RMSNorm([6, 5]), nn.Conv1d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(self.into(x)))

    (group,) = stp_fx.analyze(stp_fx.trace(Net(), torch.randn(3, 2, 5))).groups
    assert not group.exact
    assert "reduces over it" in group.notes[0]


def test_a_hooked_norm_stays_inexact_and_keeps_its_epsilon() -> None:
    model = EXACT["module"]().double().eval()
    model.norm.register_forward_pre_hook(lambda module, args: (args[0].exp(),))
    gm = stp_fx.trace(model, X)
    (group,) = stp_fx.analyze(gm).groups
    assert not group.exact
    assert stp_fx.apply_plan(gm, stp_fx.analyze(gm).plan_for({"into": [0]})).norm.eps == 1e-2


def test_norms_are_no_sites() -> None:
    _, gm = captured("module")
    assert {site.reader for site in find_sites(gm).all} == {"inner", "out"}


@pytest.mark.parametrize("name", ["module", "one module twice"])
@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_written_back_with_its_epsilon(name: str, frontend: str) -> None:
    model, gm = captured(name, frontend)
    pruned = stp_fx.apply_plan(gm, stp_fx.analyze(gm).plan_for({"into": [0, 3, 4]}))
    torch.testing.assert_close(stp_fx.write_back(pruned, model)(X), pruned(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["module", "module without a scale", "function", "computed scale"])
def test_saved_and_loaded(tmp_path: Path, name: str) -> None:
    model, gm = captured(name)
    pruned = stp_fx.apply_plan(gm, stp_fx.analyze(gm).plan_for({"into": [0, 3, 4]}))
    stp_fx.save(pruned, tmp_path / "small.safetensors")
    torch.testing.assert_close(stp_fx.load(tmp_path / "small.safetensors", model)(X), pruned(X), rtol=0, atol=0)


def test_shards_are_what_removal_gives(tmp_path: Path) -> None:
    _, gm = captured("module")
    plan = stp_fx.analyze(gm).plan_for({"into": [0, 3, 4]})
    save_file(gm.state_dict(), tmp_path / "whole.safetensors")
    prune_shards(gm, plan, tmp_path / "whole.safetensors", tmp_path / "small")
    expected = stp_fx.apply_plan(gm, plan).state_dict()
    found = {k: v for path in (tmp_path / "small").glob("*.safetensors") for k, v in load_file(path).items()}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
