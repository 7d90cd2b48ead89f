"""The laws of removing blocks, on random networks with nested branches, alone and together with channel plans."""

from __future__ import annotations

import collections
import os

import pytest
from hypothesis import given, note, seed
from hypothesis import strategies as st

from stp_fx.testing import Recipe, networks, residual_networks, token_networks
from stp_fx.testing.block_laws import BlockCase, check_block_laws

from .budget import shard_settings, wanted_examples

EXAMPLES = wanted_examples(quick=16)
SHARDS = 2 if EXAMPLES <= 200 else 16
SEED = int(os.environ.get("STP_FX_FUZZ_SEED", "0"))


def with_residuals(recipe: Recipe) -> bool:
    return bool(recipe.kinds() & {"residual", "encoder_layer"})


@pytest.mark.parametrize("shard", range(SHARDS))
def test_laws_of_blocks_hold_on_random_networks(shard: int) -> None:
    tally: collections.Counter[str] = collections.Counter()
    recipes = residual_networks() | residual_networks() | (networks() | token_networks()).filter(with_residuals)

    @seed(SEED * 1000 + shard)
    @shard_settings(-(-EXAMPLES // SHARDS))
    @given(recipes, st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 50))
    def law(recipe: Recipe, picks: list[int], scores: int) -> None:
        label = check_block_laws(BlockCase(recipe.build(), recipe.inputs(), picks, scores))
        note(label)
        tally[label] += 1

    law()
    assert tally["masks, oracle"] >= 0.3 * sum(tally.values()), f"few blocks were compared with the module: {tally}"
