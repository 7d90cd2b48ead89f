from __future__ import annotations

import pytest
import torch

import stp_fx
from stp_fx.criteria import BnScale, ScoreContext
from stp_fx.errors import CriterionError


def test_scales_alone_count(make_group, identity):
    tensors = {"w": torch.full((3, 2), 9.0), "a": torch.tensor([-1.0, 2.0, 0.5]), "b": torch.tensor([3.0, 0.0, 0.5])}
    touches = [("w", 0, "weight", identity(3)), ("a", 0, "scale", identity(3)), ("b", 0, "scale", identity(3))]
    group = make_group(tensors, touches, 3)
    assert BnScale()(group, ScoreContext(tensors)).tolist() == [2.0, 1.0, 0.5]
    assert BnScale(reduction="first")(group, ScoreContext(tensors)).tolist() == [1.0, 2.0, 0.5]
    assert BnScale(reduction="prod")(group, ScoreContext(tensors)).tolist() == [3.0, 0.0, 0.25]


def test_several_positions_a_unit(make_group):
    tensors = {"a": torch.tensor([-1.0, 2.0, 0.5, 0.25])}
    group = make_group(tensors, [("a", 0, "scale", {0: 0, 1: 1, 2: 0, 3: 1})], 2)
    assert BnScale()(group, ScoreContext(tensors)).tolist() == [1.5, 2.25]


def test_a_group_without_scales_is_named(make_group, identity):
    tensors = {"w": torch.ones(3, 2)}
    group = make_group(tensors, [("w", 0, "weight", identity(3))], 3)
    with pytest.raises(CriterionError, match=r"group 'group0'.*put 'group0' in `ignore`"):
        BnScale()(group, ScoreContext(tensors))


@pytest.mark.slow
def test_resnet50_has_a_norm_everywhere():
    torchvision = pytest.importorskip("torchvision")
    gm = stp_fx.trace(torchvision.models.resnet50(), torch.randn(1, 3, 64, 64))
    pruned = stp_fx.prune_graph(gm, "bn_scale", 0.5)
    assert stp_fx.cost(pruned).macs < 0.35 * stp_fx.cost(gm).macs
