"""Copies of a captured graph, by any chain of ways: the same function, the same tensors' names, the same provenance."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import stp_fx
from stp_fx.ir import provenance_of
from stp_fx.ir.captured import KEY, CapturedGraph
from stp_fx.ir.provenance import has_provenance

Way = Callable[[fx.GraphModule], fx.GraphModule]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.again, self.tied = self.head, self.line.weight
        self.register_buffer("kept", torch.ones(8))
        self.register_buffer("other", self.kept)
        self.register_buffer("volatile", torch.ones(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.line(x) * self.kept + self.volatile
        y[:, :2] = 0
        return self.head(y)


def pickled(gm: fx.GraphModule) -> fx.GraphModule:
    return pickle.loads(pickle.dumps(gm))


def saved(gm: fx.GraphModule) -> fx.GraphModule:
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def packaged(gm: fx.GraphModule) -> fx.GraphModule:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with torch.package.PackageExporter(buffer) as exporter:
            exporter.extern(["torch.**", "stp_fx.**", "numpy.**"])
            exporter.save_pickle("net", "net.pkl", gm)
        return torch.package.PackageImporter(io.BytesIO(buffer.getvalue())).load_pickle("net", "net.pkl")


WAYS: dict[str, Way] = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickled, "save": saved, "package": packaged}


def assert_as(gm: fx.GraphModule, first: fx.GraphModule) -> None:
    x = torch.randn(3, 4)
    assert isinstance(gm, fx.GraphModule)
    assert isinstance(gm, CapturedGraph)
    assert type(gm).__name__ == "Net"
    assert torch.equal(gm(x), first(x))
    assert gm.state_dict().keys() == first.state_dict().keys()
    assert dict(gm.named_buffers(remove_duplicate=False)).keys() == dict(first.named_buffers(remove_duplicate=False)).keys()
    assert gm.again.weight is gm.head.weight
    assert gm.tied is gm.line.weight
    assert gm.other is gm.kept
    mine, theirs = provenance_of(gm), provenance_of(first)
    assert mine.call == theirs.call
    assert mine.plan == theirs.plan
    assert [v.shape for v in mine.inputs] == [v.shape for v in theirs.inputs]
    assert gm.training is first.training


@functools.cache
def captured(frontend: str) -> fx.GraphModule:
    """A graph that is only copied."""
    return stp_fx.trace(Net().eval(), torch.randn(2, 4), frontend=frontend)


@pytest.mark.parametrize("frontend", ["fx", "export"])
@pytest.mark.parametrize(
    "chain", [*((a,) for a in WAYS), *itertools.product(WAYS, WAYS), ("pickle", "deepcopy", "copy", "pickle")]
)
def test_provenance_survives(chain: tuple[str, ...], frontend: str) -> None:
    first = gm = captured(frontend)
    for way in chain:
        gm = WAYS[way](gm)
    assert_as(gm, first)
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    assert_as(WAYS[chain[-1]](pruned), pruned)


@pytest.mark.parametrize("way", WAYS)
def test_looking_and_copying_write_nothing(way: str) -> None:
    gm = stp_fx.trace(Net(), torch.randn(2, 4))
    plain = fx.symbolic_trace(nn.Linear(4, 3))
    before = [(dict(each.__dict__), dict(each.meta), type(each).forward, each.graph.owning_module) for each in (gm, plain)]
    assert provenance_of(gm) is gm.meta[KEY]
    assert has_provenance(gm)
    assert not has_provenance(plain)
    again = WAYS[way](gm)
    again.meta["other"] = again.meta[KEY] = None
    after = [(dict(each.__dict__), dict(each.meta), type(each).forward, each.graph.owning_module) for each in (gm, plain)]
    for (attributes, *rest), (attributes_after, *rest_after) in zip(before, after, strict=True):
        assert attributes.keys() == attributes_after.keys()
        assert all(attributes[key] is value for key, value in attributes_after.items())
        assert rest == rest_after


def test_a_shallow_copy_shares_tensors_and_keeps_those_that_nobody_reads() -> None:
    gm = stp_fx.trace(Net(), torch.randn(2, 4))
    gm.register_buffer("unread", torch.zeros(2))
    again = copy.copy(gm)
    assert {name: id(t) for name, t in again.state_dict(keep_vars=True).items()} == {
        name: id(t) for name, t in gm.state_dict(keep_vars=True).items()
    }


class Counted:
    """A hook on loading that says to which module it belongs."""

    def __call__(self, module: nn.Module, *_: object) -> None:
        module.loaded_into = True  # type: ignore[assignment]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_hooks_that_refer_to_the_graph_refer_to_the_copy(way: str) -> None:
    first = copy.deepcopy(captured("fx"))
    first.register_load_state_dict_pre_hook(Counted())
    gm = WAYS[way](WAYS[way](first))
    gm.load_state_dict(first.state_dict())
    assert gm.loaded_into
    assert not hasattr(first, "loaded_into")
    assert gm.graph.owning_module is gm
