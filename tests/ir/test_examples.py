"""A bad example is told from code that cannot be traced: the model itself says what is wrong with it."""

from __future__ import annotations

import collections
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


class Named(nn.Module):
    """What a language model takes: arguments by name, one of them for a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, more: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        y = self.first(x).relu()
        y = y if mask is None else y * mask
        return self.last(y if more is None else y + more["x"])


def test_a_mapping_of_parameter_names_is_arguments_by_name() -> None:
    model, x, mask = Named().eval(), torch.randn(3, 6), torch.rand(3, 1)
    tokens = collections.UserDict(x=x, mask=mask)  # what a tokenizer gives is none of dict's kind
    for args, kwargs in (((tokens,), None), (({"x": x},), {"mask": mask}), ((), dict(tokens))):
        gm = stp_fx.trace(model, *args, kwargs=kwargs)
        torch.testing.assert_close(gm(x=x, mask=mask), model(x, mask))
    pruned = stp_fx.prune_graph(model, "magnitude", 0.5, example_inputs=tokens)
    assert pruned.get_parameter("first.weight").shape == (4, 6)
    torch.testing.assert_close(stp_fx.write_back(pruned, model, tokens)(x, mask), pruned(x=x, mask=mask))
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 8))
    model.first = inner
    shorter: Any = stp_fx.prune_submodule(model, "first", tokens, "magnitude", 0.5)
    assert shorter.first.get_parameter("0.weight").shape == (3, 6)


def test_a_mapping_that_is_one_argument_stays_one() -> None:
    class Dict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.last(self.first(batch["x"]).relu())

    model, batch = Dict().eval(), {"x": torch.randn(3, 6)}
    torch.testing.assert_close(stp_fx.trace(model, batch)(batch), model(batch))


def test_an_argument_given_twice_and_a_module_without_a_forward() -> None:
    model, x = Named(), torch.randn(3, 6)
    with pytest.raises(InputError, match="'x' is both in `example_inputs` and in `kwargs`"):
        stp_fx.trace(model, {"x": x}, kwargs={"x": x})

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.model = nn.ModuleList([model]), model

    with pytest.raises(InputError, match="Wrapper has no forward of its own: give a module that has, such as its 'model'"):
        stp_fx.trace(Wrapper(), x)
    with pytest.raises(InputError, match="ModuleList has no forward of its own: give a module that has, such as its '0'"):
        stp_fx.trace(nn.ModuleList([model]), x)
