"""What the fuzz has found: each network broke a law once. Paste new ones as they are printed."""

from __future__ import annotations

import pytest

from stp_fx.testing import Recipe, Request, Shape, spec
from stp_fx.testing.laws import check_laws

from .test_laws import case_of

FOUND = {
    "a buffer as index beside a slice": (
        Recipe(
            Shape("map", 2, (4, 4)),
            [spec("conv", out=5, kernel=3, bias=False, padding="zeros"), spec("reorder", index=[1, 4, 3, 0], spelling="buffer")],
            spec("head", how="pair"),
        ),
        Request(ratio=0.7, products="both"),
    ),
    "a slice with a step": (
        Recipe(
            Shape("map", 2, (5,)),
            [spec("conv", out=12, kernel=3, bias=False, padding="zeros"), spec("slice", start=4, stop=10, step=2), spec("bn")],
            spec("head", how="pool"),
        ),
        Request(ratio=0.5, seed=3),
    ),
    "an axis whose name is also its group's": (
        Recipe(
            Shape("map", 1, (6,)),
            [spec("conv", out=4, kernel=3, bias=False, padding="zeros"), spec("pick_one", which=0, spelling="slice")],
            spec("head", how="mean"),
        ),
        Request(),
    ),
    "a copy of all channels goes, of which one position is in no tensor": (
        Recipe(
            Shape("map", 1, (4, 4)),
            [
                spec("conv", out=6, kernel=3, bias=True, padding="zeros"),
                spec("repeat", spelling="expand"),
                spec("reorder", index=[6, 7, 1, 2, 10, 4, 8, 3, 5, 9, 0], spelling="buffer"),
                spec("to_tokens", spelling="flatten"),
                spec("flip"),
            ],
            spec("head", how="mean"),
            seed=16,
        ),
        Request(ratio=0.6, seed=34, scope="global", products="both"),
    ),
    "an einsum over an axis that is cut to one position": (
        Recipe(
            Shape("tokens", 1, (4,)),
            [spec("embed", vocabulary=7, out=2, positions=False), spec("matmul_linear", out=3, spelling="einsum")],
            spec("head", how="mean"),
            vocabulary=7,
        ),
        Request(seed=4),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_fixed(name: str) -> None:
    recipe, request = FOUND[name]
    check_laws(case_of(recipe, request))
