"""The laws of ARCHITECTURE.md, section 8, on random networks and random plans.

`make test` runs some two hundred; `make fuzz` (or ``STP_FX_FUZZ=2000 pytest tests/properties -n 2``) runs thousands, in shards
that are the same every time (STP_FX_FUZZ_SEED gives others). Failing examples are only shrunk when fuzzing.
"""

from __future__ import annotations

import collections
import os

import pytest
from hypothesis import given, note, seed
from hypothesis import strategies as st

from stp_fx.testing import Recipe, Request, networks, networks_with, requests, token_networks
from stp_fx.testing.laws import Case, check_laws
from stp_fx.testing.recipe import BLOCKS

from .budget import shard_settings, wanted_examples

EXAMPLES = wanted_examples(quick=60)
SHARDS = 4 if EXAMPLES <= 200 else 16
SEED = int(os.environ.get("STP_FX_FUZZ_SEED", "0"))
LEAST_PRUNED = 0.8
FRONT_ENDS = ("auto",) if EXAMPLES <= 200 else ("auto", "auto", "auto", "export")
"""An export takes half a second: thousands of networks draw either."""


def case_of(recipe: Recipe, request: Request, frontend: str = "auto") -> Case:
    module = recipe.build()
    others = [recipe.inputs(3, seed=1), recipe.inputs(1, seed=2)]
    if module.free:
        others.append(recipe.inputs(2, scale=2, seed=3))
    return Case(module, recipe.inputs(), request, others, frontend=frontend)


def check(recipes: st.SearchStrategy[Recipe], examples: int, number: int, tally: collections.Counter[str]) -> None:
    """Holds the drawn networks to all laws."""

    @seed(SEED * 1000 + number)
    @shard_settings(examples)
    @given(recipes, requests(), st.sampled_from(FRONT_ENDS))
    def law(recipe: Recipe, request: Request, frontend: str) -> None:
        outcome = check_laws(case_of(recipe, request, frontend))
        note(outcome.label)
        tally.update(["networks", outcome.label, *(f"kind {kind}" for kind in recipe.kinds())])

    law()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_laws_hold_on_random_networks(shard: int, tally: collections.Counter[str]) -> None:
    check(networks() | networks() | networks() | token_networks(), -(-EXAMPLES // SHARDS), shard, tally)
    assert tally["nothing pruned"] <= (1 - LEAST_PRUNED) * tally["networks"], f"too little was pruned: {tally}"


@pytest.mark.parametrize("kind", sorted(set(BLOCKS) - {"identity"}))
def test_laws_hold_around_every_kind_of_block(kind: str, tally: collections.Counter[str]) -> None:
    check(networks_with(kind), max(2, EXAMPLES // 100), 500, tally)
