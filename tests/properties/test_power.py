"""The laws have teeth: an engine with a mistake planted in it breaks them."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, seed

from stp_fx.analysis.propagate import _Propagation
from stp_fx.errors import StpFxError
from stp_fx.rules import OpCall
from stp_fx.rules.registry import RULES
from stp_fx.testing import Recipe, Request, networks_with, requests
from stp_fx.testing.laws import Case, check_laws

from .budget import shard_settings


def broken(kind: str, examples: int = 10) -> int:
    """How many networks around a kind of block break a law."""
    count = 0

    @seed(0)
    @shard_settings(examples)
    @given(networks_with(kind), requests())
    def law(recipe: Recipe, request: Request) -> None:
        nonlocal count
        try:
            check_laws(Case(recipe.build(), recipe.inputs(), request))
        except (AssertionError, StpFxError, RuntimeError):  # the last: shapes that do not fit when torch runs it
            count += 1

    law()
    return count


def _as_if_pointwise(call: OpCall) -> None:
    call.assign(call.out, call.dims(call.args[0]))


@pytest.mark.parametrize(("op", "kind"), [("aten.flip.default", "flip"), ("aten.roll.default", "roll")])
def test_a_permutation_taken_for_pointwise(op: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(RULES.get(op), rule=_as_if_pointwise)
    monkeypatch.setitem(RULES._values, op, wrong)
    assert broken(kind) > 0


@pytest.mark.parametrize("kind", ["ln", "gn", "spatial_gate", "channel_attention"])
def test_a_group_wrongly_called_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Propagation, "inexact", lambda *args: None)
    monkeypatch.setattr(_Propagation, "excludes", lambda *args: True)
    assert broken(kind) > 0


@pytest.mark.parametrize("kind", ["residual", "bn", "glu", "attention"])
def test_coupling_left_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Propagation, "unify", lambda self, first, second: first)
    assert broken(kind) > 0
