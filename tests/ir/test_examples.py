"""A bad example is told from code that cannot be traced: the model itself says what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stp_fx
from stp_fx.errors import InputError, TraceError
from stp_fx.ir.trace import _FRONT_ENDS
from stp_fx.testing.untouched import assert_untouched, snapshot


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    stp_fx.trace(nn.Linear(2, 2), torch.randn(2, 2), frontend="export")  # what it imports adds filters of warnings


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        y = self.norm(self.conv(x)).mean((2, 3))
        return self.head(y * options["scale"] if options else y)


@pytest.mark.parametrize("frontend", ["auto", "fx", "export"])
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 2, 2), (2, 8, 8), (2, 3)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_wrong_shape_is_a_bad_example(frontend: str, shape: tuple[int, ...], device: str) -> None:
    net = Net().eval()
    before = snapshot(net)
    with pytest.raises(InputError, match="Net itself fails on this example") as error:
        stp_fx.trace(net, torch.zeros(shape, device=device), frontend=frontend)
    assert str(shape) in str(error.value)
    assert "submodule" not in str(error.value)
    assert_untouched(before)


def test_a_bad_example_is_told_before_the_second_front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export may take minutes to fail on it."""
    asked = []
    monkeypatch.setitem(_FRONT_ENDS, "export", lambda *_: asked.append("export"))
    with pytest.raises(InputError, match="itself fails"):
        stp_fx.trace(Net().eval(), torch.zeros(2, 1, 8, 8))
    assert not asked


def test_a_wrong_dtype_and_an_index_out_of_range() -> None:
    with pytest.raises(InputError, match="itself fails"):
        stp_fx.trace(nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 3)), torch.randn(2, 3))
    with pytest.raises(InputError, match=r"itself fails.*index out of range"):
        stp_fx.trace(nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 3)), torch.full((2, 3), 4))
    with pytest.raises(InputError, match="do not fit"):
        stp_fx.trace(Net(), (torch.randn(2, 3, 8, 8), torch.randn(2)))


def test_wrong_named_arguments() -> None:
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match="KeyError: 'scale'"):
        stp_fx.trace(Net(), x, kwargs={"factor": torch.rand(8)})
    with pytest.raises(InputError, match="missing a required argument: 'x'"):
        stp_fx.trace(Net(), None, kwargs={"scale": torch.rand(8)})
    with pytest.raises(InputError, match="unexpected keyword argument 'scale'"):
        stp_fx.trace(nn.Linear(4, 4), torch.randn(2, 4), kwargs={"scale": torch.rand(8)})


class OnData(Net):
    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return super().forward(x if float(x.detach().cpu().numpy().sum()) > 0 else -x)


class OnCpu(Net):
    """Runs for real, and not on meta tensors."""

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        if x.device.type == "meta":
            raise RuntimeError("only real tensors, please")
        return super().forward(x if x.sum() > 0 else F.relu(-x))


@pytest.mark.parametrize("kind", [OnData, OnCpu])
def test_code_that_runs_and_cannot_be_traced_is_no_bad_example(kind: type[nn.Module]) -> None:
    net, x = kind(), torch.randn(2, 3, 8, 8)
    before = snapshot(net, x)
    with pytest.raises(TraceError, match="cannot be captured"):
        stp_fx.trace(net, x)
    assert_untouched(before)
