"""Random networks, channels chosen by hand: a plan removes the positions named and what goes with them, or says why not."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, seed

import stp_fx
from stp_fx.errors import InputError
from stp_fx.testing import Recipe, Request, networks, requests, token_networks
from stp_fx.testing.laws import assert_same
from stp_fx.testing.measure import run

from .budget import shard_settings, wanted_examples

EXAMPLES = -(-wanted_examples(quick=60) // 2)
REASONS = "cannot be removed: |is one of a product and is not removed alone; give all positions of a unit: |this removes all "


def planned(graph: stp_fx.ChannelGraph, axis: str, indices: Sequence[int]) -> stp_fx.PrunePlan | str:
    """The plan, or the reason why there is none."""
    try:
        return graph.plan_for({axis: indices})
    except InputError as error:
        return str(error)


def check_any_position(graph: stp_fx.ChannelGraph, draws: np.random.Generator) -> None:
    """One position of one axis: a complete plan without it, or a reason."""
    axis = graph.axes[draws.integers(len(graph.axes))]
    index = int(draws.integers(-axis.size, axis.size))
    plan = planned(graph, axis.name, [index])
    if isinstance(plan, str):
        assert re.search(REASONS, plan)
        return
    assert index % axis.size not in plan.kept[axis.tensor, axis.dim]
    assert index % axis.size not in graph.survivors(plan).kept(axis.tensor, axis.dim)


def unit_by_hand(graph: stp_fx.ChannelGraph, draws: np.random.Generator) -> stp_fx.PrunePlan | None:
    """All positions that a unit has on an axis: the plan of that unit; None where it is the last one."""
    group = graph.groups[draws.integers(len(graph.groups))]
    unit = int(draws.integers(group.size))
    member = group.members[draws.integers(len(group.members))]
    wanted = member.index[member.unit == unit]
    plan = planned(graph, member.axis.name, wanted.tolist())
    if isinstance(plan, str):
        assert plan.startswith("this removes all ")
        return None
    assert int((~graph.survivors(plan).units).sum()) == 1  # nearly always this unit: of a sliced product two may look alike
    others = np.setdiff1d(np.arange(member.axis.size), wanted)
    np.testing.assert_array_equal(plan.kept[member.axis.tensor, member.axis.dim], others)
    return plan


def check_carried_out(recipe: Recipe, gm: torch.fx.GraphModule, plan: stp_fx.PrunePlan) -> None:
    graph, pruned = stp_fx.analyze(gm), stp_fx.apply_plan(gm, plan)
    survivors = graph.survivors(plan)
    assert survivors.params == stp_fx.cost(pruned).params
    tensors = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    for axis in graph.axes:
        if axis.tensor in tensors:
            assert tensors[axis.tensor].shape[axis.dim] == len(survivors.kept(axis.tensor, axis.dim))
    if all(group.exact for group in graph.groups if not survivors.units[group.units].all()):
        masked = stp_fx.apply_plan(gm, plan, mask=True)
        assert_same(run(pruned, recipe.inputs()), run(masked, recipe.inputs()), "masked against removed")


@pytest.mark.parametrize(("shard", "strategy"), [(0, networks()), (1, token_networks())])
def test_channels_of_random_networks_by_hand(shard: int, strategy: object) -> None:
    @seed(900 + shard)
    @shard_settings(EXAMPLES)
    @given(strategy, requests())
    def law(recipe: Recipe, request: Request) -> None:
        gm = stp_fx.trace(recipe.build(), recipe.inputs())
        graph, draws = stp_fx.analyze(gm), np.random.default_rng(request.seed)
        for _ in range(8):
            if graph.axes:
                check_any_position(graph, draws)
            plan = unit_by_hand(graph, draws) if graph.groups else None
        if graph.groups and plan is not None:
            check_carried_out(recipe, gm, plan)

    law()
