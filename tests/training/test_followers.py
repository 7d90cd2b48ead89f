"""Moving averages that follow every rewrite: compensated, recalibrated, resumed, and averaged on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import stp_fx
from stp_fx.errors import InputError

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8),
        nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    return stp_fx.trace(net.double(), X)


def started(**options: Any) -> tuple[stp_fx.PATPassManager, AveragedModel]:
    gm = traced()
    ema = AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    options = {"ratio": 0.5, "compensation": "mean", "train_loader": [X], "optimizer": (), **options}
    return stp_fx.PATPassManager(gm, followers=[ema], **options), ema


def given_by(gm: nn.Module, name: str) -> torch.Tensor:
    """What a layer gives for all of the data."""
    seen: list[torch.Tensor] = []
    handle = gm.get_submodule(name).register_forward_hook(lambda module, arguments, output: seen.append(output.detach()))
    gm.eval()(X)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("compensation", [None, "mean", "least_squares"])
def test_a_follower_is_compensated_and_recalibrated_by_what_it_computes(compensation: str | None, masks: bool) -> None:
    """The layer whose inputs lose units gives, on average, what it gave in the follower; and the norm knows its inputs."""
    pat, ema = started(compensation=compensation, recalibrate=True, steps=2 if masks else 1)
    with torch.no_grad():
        for p in ema.module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    before = given_by(ema.module, "2").mean(0)
    pat.prune(0)
    kept = stp_fx.plan_of(pat.model).kept["2.weight", 0] if not masks else range(8)
    after = given_by(ema.module, "2").mean(0)
    assert torch.allclose(after, before[list(kept)]) == (compensation is not None)
    if not masks:
        assert after.shape == (4,)
        norm = ema.module.get_submodule("5")
        assert torch.allclose(norm.running_mean, given_by(ema.module, "4").mean(0))
        assert torch.allclose(norm.running_var, given_by(ema.module, "4").var(0))


def test_with_the_same_weights_a_follower_becomes_what_the_model_becomes() -> None:
    for compensation in ("mean", "least_squares"):
        pat, ema = started(compensation=compensation, recalibrate=True, steps=2)
        for epoch in range(2):
            pat.prune(epoch)
            expected = pat.model.state_dict()
            assert list(expected) == list(ema.module.state_dict())
            assert all(torch.equal(value, expected[key]) for key, value in ema.module.state_dict().items())


def test_a_follower_with_added_biases_is_resumed() -> None:
    pat, ema = started(steps=2)
    pat.prune(0)
    saved = copy.deepcopy((pat.state_dict(), pat.model.state_dict(), ema.state_dict()))
    again, other = started(steps=2)
    again.load_state_dict(saved[0])
    again.model.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    for each in (pat, again):
        each.prune(1)
    expected = ema.module.state_dict()
    assert "2.bias" in expected
    assert all(torch.equal(value, expected[key]) for key, value in other.module.state_dict().items())


@pytest.mark.parametrize("average", [None, get_swa_multi_avg_fn(), get_ema_multi_avg_fn(0.9)])
@pytest.mark.parametrize("buffers", [True, False])
def test_averages_go_on_over_masks(average: Any, buffers: bool) -> None:
    gm = stp_fx.trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double(), X)
    swa = AveragedModel(gm, multi_avg_fn=average, use_buffers=buffers)
    pat = stp_fx.PATPassManager(gm, ratio=0.5, steps=3, followers=[swa], optimizer=())
    for epoch in range(3):
        pat.prune(epoch)
        for _ in range(2):
            swa.update_parameters(gm)
        assert torch.allclose(swa(X), gm(X))
        masks = [name for name, _ in gm.named_buffers()]
        assert masks == [name for name, _ in swa.module.named_buffers()]
        assert bool(masks) == (epoch < 2)


def test_what_is_no_follower_is_refused() -> None:
    gm = traced()
    other = stp_fx.trace(nn.Linear(6, 3).double(), X)
    for followers, message in (
        (AveragedModel(gm), "give a list"),
        ([nn.Linear(2, 2)], "holds a Linear"),
        ([gm], "shares parameters"),
        ([AveragedModel(other)], "another structure"),
        (["ema"], "holds a str"),
    ):
        with pytest.raises(InputError, match=message):
            stp_fx.PATPassManager(gm, optimizer=(), followers=followers)  # type: ignore[arg-type]
