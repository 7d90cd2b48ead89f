"""The laws of ARCHITECTURE.md, section 8, on random networks and random plans.

`make test` runs a few dozen; `make fuzz` (or ``STP_FX_FUZZ=2000 pytest tests/properties -n 2``) runs thousands, in shards
that are the same every time (STP_FX_FUZZ_SEED gives others).
"""

from __future__ import annotations

import collections
import os

import pytest
from conftest import shard_settings, wanted_examples
from hypothesis import given, note, seed

from stp_fx.testing import Recipe, Request, networks, requests, token_networks
from stp_fx.testing.laws import Case, check_laws

EXAMPLES = wanted_examples(quick=60)
SHARDS = 4 if EXAMPLES <= 200 else 16
SEED = int(os.environ.get("STP_FX_FUZZ_SEED", "0"))
LEAST_PRUNED = 0.8


def case_of(recipe: Recipe, request: Request) -> Case:
    module = recipe.build()
    others = [recipe.inputs(3, seed=1), recipe.inputs(1, seed=2)]
    if module.free:
        others.append(recipe.inputs(2, scale=2, seed=3))
    return Case(module, recipe.inputs(), request, others)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_laws_hold_on_random_networks(shard: int, tally: collections.Counter[str]) -> None:
    @seed(SEED * 1000 + shard)
    @shard_settings(-(-EXAMPLES // SHARDS))
    @given(networks() | networks() | networks() | token_networks(), requests())
    def law(recipe: Recipe, request: Request) -> None:
        case = case_of(recipe, request)
        outcome = check_laws(case)
        note(outcome.label)
        tally.update(["networks", outcome.label, *(f"kind {kind}" for kind in recipe.kinds())])

    law()
    assert tally["nothing pruned"] <= (1 - LEAST_PRUNED) * tally["networks"], f"too little was pruned: {tally}"
