"""Captures as plain data: what can be described comes back, and nothing else is believed."""

from __future__ import annotations

import collections
import json
from typing import Any

import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.errors import InputError
from stp_fx.ir import provenance_of, retrace
from stp_fx.ir.call import Call, described, restored

Pair = collections.namedtuple("Pair", "first second")


def test_examples_come_back_through_json() -> None:
    value = (torch.zeros(2, 3), [torch.ones(4, dtype=torch.int64), None, 1.5], {"a": {"b": (torch.tensor(True), "text")}, "c": 7})
    data = json.loads(json.dumps(described(value)))
    again = restored(data, torch.device("meta"))
    assert described(again) == described(value)
    assert type(again) is tuple
    assert again[1][1:] == [None, 1.5]
    assert again[2]["a"]["b"][1] == "text"
    assert again[0].is_meta
    assert again[1][0].dtype is torch.int64


@pytest.mark.parametrize("value", [Pair(1, 2), {1: 2}, object(), {3}, 1j, float("nan"), range(3)])
def test_other_objects_have_no_description(value: Any) -> None:
    with pytest.raises(InputError, match="cannot be described"):
        described((value,))


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"tensor": ["float32", [1]], "list": []},
        {"tensor": ["float32"]},
        {"tensor": ["load", [1]]},
        {"tensor": ["float32", [-1]]},
        {"tensor": ["float32", [True]]},
        {"tensor": ["float32", [1 << 20, 1 << 20]]},
        {"tensor": ["float32", [0, 1 << 62]]},
        {"tensor": ["float32", [1] * 65]},
        {"module": "os"},
        {"list": {}},
        {"dict": []},
        {"list": [[]]},
    ],
)
def test_false_descriptions_are_refused(data: Any) -> None:
    with pytest.raises(InputError):
        restored(data, torch.device("meta"))
    nested = data
    for _ in range(40):
        nested = {"list": [nested]}
    with pytest.raises(InputError):
        restored(nested, torch.device("meta"))


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.first(x))
        return 2 * x if self.first.training else x


@pytest.mark.parametrize("training", [True, False])
def test_a_capture_is_repeated_in_the_modes_it_was_made_in(training: bool) -> None:
    model = Moody().train(training)
    model.first.train(not training)
    gm = stp_fx.trace(model, torch.randn(3, 4))
    call = provenance_of(gm).call
    assert call is not None
    other = Moody()
    assert retrace(other, call).code == gm.code
    assert all(module.training for module in other.modules())
    with pytest.raises(InputError, match="no module 'first'"):
        retrace(nn.Linear(4, 4), call)
    assert retrace(other, Call("export", call.args, call.kwargs, training)) is not None


def test_calls_that_fit_nothing() -> None:
    one = described(torch.zeros(3, 4))
    for args, kwargs, frontend, error in (
        (None, None, "fx", InputError),
        (one, {"dict": {}}, "fx", InputError),
        ({"tuple": [one]}, {"list": []}, "fx", InputError),
        ({"tuple": [one, one]}, {"dict": {}}, "fx", InputError),
        ({"tuple": [one]}, {"dict": {}}, "magic", InputError),
        ({"tuple": [described(torch.zeros(3, 5))]}, {"dict": {}}, "fx", InputError),
    ):
        model = Moody()
        with pytest.raises(error):
            retrace(model, Call(frontend, args, kwargs, False))
        assert model.training
