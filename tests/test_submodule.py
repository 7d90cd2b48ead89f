"""Detectors and optical flow: the backbone is pruned, the rest is as it was and still fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import stp_fx
from stp_fx.errors import InputError, NothingToPruneError

IMAGES = [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(k)) for k in range(2)]


def detector(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {} if name.startswith("ssdlite") else {"min_size": 64, "max_size": 96}
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3, **sizes).eval()


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "backbone.body.0.0.weight"),
        ("retinanet_resnet50_fpn", "backbone.body.layer3.0.conv2.weight"),
        ("ssdlite320_mobilenet_v3_large", "backbone.features.0.0.0.weight"),
    ],
)
def test_detectors(name: str, inside: str) -> None:
    model = detector(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = stp_fx.prune_submodule(model, "backbone", IMAGES)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        whole, part = (m.backbone(torch.rand(2, 3, 96, 64)) for m in (model, pruned))
        found = pruned(IMAGES)
    assert [f.shape for f in whole.values()] == [f.shape for f in part.values()]
    assert list(whole) == list(part)
    assert all(set(each) == {"boxes", "labels", "scores"} for each in found)
    count = lambda m: sum(p.numel() for p in m.backbone.parameters())  # noqa: E731
    assert count(pruned) < 0.6 * count(model)
    assert set(pruned.state_dict()) <= set(before)
    assert pruned.state_dict()[inside].shape[0] < before[inside].shape[0] or "features.0" in inside
    losses = pruned.train()(IMAGES, [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}] * 2)
    sum(losses.values()).backward()
    assert all(p.grad is not None for n, p in pruned.backbone.named_parameters() if p.requires_grad)


def test_an_encoder_in_a_loop() -> None:
    torch.manual_seed(0)
    model = torchvision.models.optical_flow.raft_small(weights=None).eval()
    pair = (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    pruned = stp_fx.prune_submodule(model, "context_encoder", pair, ratio=0.4)
    with torch.no_grad():
        assert pruned(*pair, num_flow_updates=2)[-1].shape == (1, 2, 128, 128)
    assert stp_fx.cost(pruned.context_encoder).params < 0.6 * sum(p.numel() for p in model.context_encoder.parameters())


class Whole(nn.Module):
    """Control flow over values around a part that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))
        self.unused, self.last = nn.Linear(2, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        if x.sum() > 0:
            x = -x
        return self.last(self.body(x * scale).mean((2, 3)))


def test_calibration_is_what_the_model_takes() -> None:
    torch.manual_seed(0)
    model = Whole().train()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    pruned = stp_fx.prune_submodule(model, "body", batches[0], "variance", 0.5, calibration=batches, compensation="mean")
    assert model.training
    assert pruned.training
    assert pruned.body.get_parameter("0.weight").shape == (8, 3, 3, 3)
    direct = stp_fx.prune_graph(
        stp_fx.trace(model.body, batches[0]), "variance", 0.5, compensation="mean",
        calibration=[-b if b.sum() > 0 else b for b in batches],
    )  # fmt: skip
    assert stp_fx.plan_of(pruned.body) == stp_fx.plan_of(direct)
    assert torch.allclose(pruned.eval().body(batches[0]), direct.eval()(batches[0]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("head",), InputError, "no submodule 'head'; its parts are 'body', 'unused', 'last'"),
        (("",), InputError, "no submodule"),
        (("unused",), InputError, "does not call 'unused'"),
        (("last",), NothingToPruneError, "no channel"),
    ],
)
def test_bad_arguments(arguments: tuple[str], error: type[Exception], message: str) -> None:
    model: Any = Whole()
    with pytest.raises(error, match=message):
        stp_fx.prune_submodule(model, *arguments, torch.randn(2, 3, 8, 8))
    assert model.training
    assert not model.body._forward_pre_hooks
