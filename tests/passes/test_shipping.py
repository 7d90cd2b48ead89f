"""A pruned graph is a module like any other: it exports, compiles, pickles, and can be pruned again."""

from __future__ import annotations

import io

import pytest
import torch
import torchvision
from torch import nn

import stp_fx

NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 12, [2, 2], [3, 3], [4, 4], num_classes=5),
    "vit": lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=5),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch 2.6, of constants in its own graph
@pytest.mark.filterwarnings("ignore:Node .* does not reference")
@pytest.mark.filterwarnings("ignore:Additional .* warnings suppressed about get_attr")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_ships(name: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = NETWORKS[name]().eval()
    x = torch.randn(2, 3, 64, 64)
    pruned = stp_fx.prune_graph(model, example_inputs=x)
    expected = pruned(x)
    exported = torch.export.export(pruned, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    buffer = io.BytesIO()
    torch.save(pruned, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), expected)
    assert stp_fx.plan_of(again) == stp_fx.plan_of(pruned)
    assert stp_fx.cost(stp_fx.prune_graph(again, ratio=0.3)).macs < stp_fx.cost(pruned).macs
