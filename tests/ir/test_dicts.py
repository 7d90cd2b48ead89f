"""Dicts among the arguments, whose keys a forward asks for, and values that are None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stp_fx
from stp_fx.ir import provenance_of

Given = dict[str, Any]
Reads = Callable[[Tensor, Given], Tensor]


class Conditioned(nn.Module):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.a, self.b, self.reads = nn.Linear(4, 8), nn.Linear(8, 3), reads

    def forward(self, x: Tensor, given: Given) -> Tensor:
        return self.b(self.reads(self.a(x), given).relu())


def asked_for(y: Tensor, given: Given) -> Tensor:
    if "scale" not in given:
        raise ValueError("no scale")
    return y * given["scale"] if "shift" not in given else y + given["shift"]


def got(y: Tensor, given: Given) -> Tensor:
    shift = given.get("shift")
    return y * given.get("scale", 1) if shift is None else y + shift


def gone_through(y: Tensor, given: Given) -> Tensor:
    for name, value in given.items():
        if name != "nothing":
            y = y * value
    for name in given:
        if name != "nothing":
            y = y + given[name]
    return y


def by_view(y: Tensor, given: Given) -> Tensor:
    names = [name for name in given.keys() if name != "nothing"]  # noqa: SIM118
    values = [value for value in given.values() if value is not None]
    return y * len(names) + values[0]


def spread(y: Tensor, given: Given) -> Tensor:
    def scaled(scale: Tensor, nothing: Tensor | None) -> Tensor:
        return y * scale if nothing is None else y

    return scaled(**given)


def none_of(y: Tensor, given: Given) -> Tensor:
    return y * given["scale"] if given["nothing"] is None else y


READS = {f.__name__: f for f in (asked_for, got, gone_through, by_view, spread, none_of)}


def given(batch: int) -> Given:
    return {"scale": torch.randn(batch, 1), "nothing": None}


@pytest.mark.parametrize("name", READS)
def test_what_a_dict_is_asked(name: str) -> None:
    model = Conditioned(READS[name])
    gm = stp_fx.trace(model, (torch.randn(2, 4), given(2)), frontend="fx")
    x, other = torch.randn(5, 4), given(5)
    torch.testing.assert_close(gm(x, other), model(x, other))
    assert provenance_of(gm).notes == ()
    pruned = stp_fx.prune_graph(gm)
    assert pruned.get_submodule("a").out_features == 4
    assert pruned(x, other).shape == (5, 3)


@pytest.mark.parametrize("name", [name for name in READS if name != "by_view"])
def test_another_dict_is_refused(name: str) -> None:
    """A branch that the graph has not taken is never passed over in silence."""
    gm = stp_fx.trace(Conditioned(READS[name]), (torch.randn(2, 4), given(2)), frontend="fx")
    with pytest.raises(AssertionError, match="traced for another shape"):
        gm(torch.randn(2, 4), {"scale": torch.randn(2, 1), "nothing": torch.randn(2, 1), "shift": torch.randn(2, 1)})


class Optional(nn.Module):
    """A module that stays a call gives None among its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attend(x, x, x, need_weights=False)
        return self.head(y if weights is None else y * weights.sum())


def test_outputs_that_are_none() -> None:
    model, x = Optional(), torch.randn(3, 5, 8)
    gm = stp_fx.trace(model, x, frontend="fx")
    torch.testing.assert_close(gm(x), model(x))
