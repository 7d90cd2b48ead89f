"""Channels of what a network returns are kept, in whatever object it returns them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import stp_fx


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    features: torch.Tensor | None = None


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


RETURNED = {
    "tensor": lambda y, z: y,
    "tuple": lambda y, z: (y, z),
    "dict": lambda y, z: {"logits": y, "features": z},
    "dataclass": lambda y, z: Answer(y, z),
    "dataclass in a list": lambda y, z: [Answer(y), z],
}


class Net(nn.Module):
    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.stem, self.head, self.returned = nn.Linear(4, 8), nn.Linear(8, 5), returned

    def forward(self, x: torch.Tensor) -> Any:
        z = torch.relu(self.stem(x))
        return self.returned(self.head(z), x)


@pytest.mark.parametrize("frontend", ["fx", "export"])
@pytest.mark.parametrize("kind", RETURNED)
def test_the_head_is_kept(kind: str, frontend: str) -> None:
    model = Net(RETURNED[kind]).eval()
    try:
        gm = stp_fx.trace(model, torch.randn(2, 4), frontend=frontend)
    except stp_fx.errors.TraceError:  # an error that says so is no silent one
        assert kind.startswith("dataclass")
        return
    assert [group.name for group in stp_fx.analyze(gm).groups] == ["stem.weight:0"]


def test_tensors_within_objects() -> None:
    from stp_fx.ir.nested import tensors_within

    x, y, z = torch.zeros(1), torch.ones(1), torch.ones(2)
    circle: Any = Answer(x, y)
    circle.again = circle
    found = tensors_within({"a": [circle], "b": Slots(z), "c": {3, None}})
    assert {id(each) for each in found} == {id(x), id(y), id(z)}
