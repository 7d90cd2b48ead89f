"""Random networks, saved in every state and loaded into one with other weights: the same bits come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, note, seed
from torch import fx, nn

import stp_fx
from stp_fx.errors import NothingToPruneError
from stp_fx.testing import Recipe, Request, networks, requests, token_networks
from stp_fx.testing.laws import assert_same
from stp_fx.testing.measure import run

from .budget import shard_settings, wanted_examples

EXAMPLES = -(-wanted_examples(quick=60) // 2)
SHARDS = 2


def other_weights(recipe: Recipe) -> nn.Module:
    model = recipe.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def states(recipe: Recipe, request: Request) -> list[fx.GraphModule]:
    """A network as it was traced, pruned, pruned again, and masked after that, as far as it has channels for it."""
    found = [stp_fx.trace(recipe.build(), recipe.inputs())]
    try:
        for ratio in (request.ratio, 0.4):
            found.append(stp_fx.prune_graph(found[-1], stp_fx.criteria.Random(seed=request.seed), ratio, scope=request.scope))
        more = stp_fx.prune_graph(stp_fx.trace(found[-1], recipe.inputs()), "random", 0.5)
    except NothingToPruneError:
        return found
    return [*found, stp_fx.apply_plan(found[-1], stp_fx.plan_of(more), mask=True)]


def check_back(saved: fx.GraphModule, loaded: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    theirs, ours = saved.state_dict(), loaded.state_dict()
    assert list(theirs) == list(ours)
    for name, value in theirs.items():
        assert value.dtype == ours[name].dtype, name
        assert torch.equal(value, ours[name]), name
    assert stp_fx.plan_of(loaded) == stp_fx.plan_of(saved)
    assert stp_fx.cost(loaded) == stp_fx.cost(saved)
    assert_same(run(loaded, inputs), run(saved, inputs), "loaded", tolerance=0.0)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_networks_come_back_bit_for_bit(shard: int, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"

    @seed(700 + shard)
    @shard_settings(-(-EXAMPLES // SHARDS))
    @given(networks() | networks() | token_networks(), requests())
    def check(recipe: Recipe, request: Request) -> None:
        found = states(recipe, request)
        note(f"{len(found)} states")
        for each in found:
            stp_fx.save(each, path)
            model = other_weights(recipe)
            check_back(each, stp_fx.load(path, model), recipe.inputs())
            assert all(bool((parameter == 0).all()) for parameter in model.parameters())

    check()
