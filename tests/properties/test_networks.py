"""The random networks themselves: they run, print as code, and are the same every time."""

from __future__ import annotations

import collections

import pytest
import torch
from hypothesis import given, seed

from stp_fx.testing import Recipe, Shape, networks, spec, token_networks
from stp_fx.testing.laws import assert_same
from stp_fx.testing.recipe import BLOCKS

from .budget import shard_settings, wanted_examples

EXAMPLES = wanted_examples(quick=60)


@pytest.mark.parametrize("kind", ["networks", "token_networks"])
def test_networks_are_deterministic_and_print_as_code(kind: str) -> None:
    @seed(0)
    @shard_settings(min(EXAMPLES, 300))
    @given(networks() if kind == "networks" else token_networks())
    def check(recipe: Recipe) -> None:
        printed = eval(repr(recipe), {"Recipe": Recipe, "Shape": Shape, "spec": spec})
        with torch.no_grad():
            expected = recipe.build()(*recipe.inputs())
            assert_same(printed.build()(*printed.inputs()), expected, "the printed recipe", tolerance=0.0)

    check()


def test_every_kind_of_block_is_drawn_somewhere() -> None:
    seen: collections.Counter[str] = collections.Counter()

    @seed(1)
    @shard_settings(400)
    @given(networks() | networks() | networks() | token_networks())
    def count(recipe: Recipe) -> None:
        seen.update(recipe.kinds())

    count()
    missing = set(BLOCKS) - set(seen)
    assert len(missing) <= len(BLOCKS) // 10, f"never drawn: {missing}"
