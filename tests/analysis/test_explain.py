"""``ChannelGraph.explain``: axes, modules, groups, nodes, reasons; and names that are none of these."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import stp_fx
from stp_fx.errors import InputError


@pytest.fixture(scope="module")
def resnet() -> stp_fx.ChannelGraph:
    model = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    return stp_fx.analyze(stp_fx.trace(model, torch.empty(1, 3, 64, 64)))


@pytest.fixture(scope="module")
def vit() -> stp_fx.ChannelGraph:
    model = torchvision.models.VisionTransformer(64, 16, 1, 4, 32, 64, num_classes=5).eval()
    return stp_fx.analyze(stp_fx.trace(model, torch.empty(1, 3, 64, 64)))


def test_an_axis_says_its_group_and_the_group_says_who_it_cuts(resnet: stp_fx.ChannelGraph) -> None:
    lines = resnet.explain("layer1.0.conv1.weight:0").splitlines()
    assert lines[0] == ("layer1.0.conv1.weight:0 (64 positions, weight out): 64 in group 'layer1.0.conv1.weight:0' of 64 units")
    assert lines[1] == "group 'layer1.0.conv1.weight:0': 64 units"
    assert "  outputs of layer1.0.conv1" in lines
    assert "  inputs of layer1.0.conv2" in lines
    assert "  masking equals removing" in lines


def test_one_position_says_what_goes_with_it(resnet: stp_fx.ChannelGraph) -> None:
    said = resnet.explain("layer1.0.conv1", 3)
    assert said.startswith("layer1.0.conv1.weight:0[3]: unit 3 of group")
    assert "layer1.0.conv2.weight:1[3]" in said


def test_a_module_of_modules_is_summed_up_by_group_and_reason(resnet: stp_fx.ChannelGraph) -> None:
    lines = resnet.explain("layer1").splitlines()
    assert lines[0] == "layer1: 32 axes of 20 tensors"
    assert sum(line.startswith("  group ") for line in lines) == 3
    assert any(line.startswith("  pinned, kernel or spatial positions") and "layer1.0.conv1.weight:2" in line for line in lines)


@pytest.mark.parametrize("name", ["layer1.0.relu", "layer1_0_relu"])
def test_a_module_without_parameters_is_a_node(resnet: stp_fx.ChannelGraph, name: str) -> None:
    said = resnet.explain(name)
    assert said.startswith("node 'layer1_0_relu', a tensor of (1, 64, 16, 16)")
    assert "dim 1: 64 in group 'layer1.0.conv1.weight:0'" in said


def test_a_node_with_nothing_to_cut_says_so(resnet: stp_fx.ChannelGraph) -> None:
    assert resnet.explain("x").endswith("no dimension of it can be cut")


def test_pinned_axes_by_reason(resnet: stp_fx.ChannelGraph) -> None:
    assert resnet.pinned["graph output"] == ("fc.weight:0", "fc.bias:0")
    assert resnet.explain("graph output") == "graph output: 2 axes: fc.weight:0, fc.bias:0"
    assert "10 pinned: graph output (node 'output')" in resnet.explain("fc.bias")


def test_without_a_name_the_whole_graph(resnet: stp_fx.ChannelGraph) -> None:
    lines = resnet.explain().splitlines()
    assert lines[0] == f"12 groups of {resnet.units:,} units over {len(resnet.axes)} axes"
    assert len(lines) == 1 + len(resnet.pinned)
    assert "2 axes pinned: graph output (e.g. fc.weight:0)" in lines


def test_every_axis_is_explained(vit: stp_fx.ChannelGraph) -> None:
    for axis in vit.axes:
        said = vit.explain(axis.name)
        assert said.startswith(axis.name)
        assert "in group" in said or "pinned" in said


def test_a_factor_of_a_product_names_the_other(vit: stp_fx.ChannelGraph) -> None:
    heads = next(g for g in vit.groups if g.size == 4)
    assert f"one factor of view, 4 x 8: '{heads.name}' x '{heads.name}#2'" in vit.explain(heads.name)


def test_an_op_without_a_rule_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.linalg.qr(self.first(x).mT)[0].mT)

    graph = stp_fx.analyze(stp_fx.trace(Odd(), torch.empty(2, 6)))
    (op,) = graph.unknown
    assert f"no rule for {op}, at linalg_qr: what it touches is pinned" in graph.explain()
    assert graph.pinned[f"no rule for {op}"] == ("first.weight:0", "first.bias:0")
    assert f"8 pinned: no rule for {op} (node 'linalg_qr')" in graph.explain("first.weight:0")


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("layer1.0.conv", "'layer1.0.conv1'"),
        ("layer1.0.conv1.weigth:0", "'layer1.0.conv1.weight:0'"),
        ("graph outputs", "'graph output'"),
        ("Layer1", "'layer1'"),
        ("qqqq", "explain() without a name gives an overview"),
    ],
)
def test_unknown_names_suggest_close_ones(resnet: stp_fx.ChannelGraph, name: str, close: str) -> None:
    with pytest.raises(InputError, match="no parameter, axis, module, node, group or reason") as caught:
        resnet.explain(name)
    assert repr(name) in str(caught.value)
    assert close in str(caught.value)


@pytest.mark.parametrize(("name", "shape"), [("bn1.num_batches_tracked", r"\(\)"), ("conv1.weight:9", r"\(64, 3, 7, 7\)")])
def test_tensors_without_such_an_axis(resnet: stp_fx.ChannelGraph, name: str, shape: str) -> None:
    with pytest.raises(InputError, match=f"has shape {shape}: no axis longer than one"):
        resnet.explain(name)


def test_an_index_out_of_range(resnet: stp_fx.ChannelGraph) -> None:
    with pytest.raises(InputError, match=r"conv1\.weight:0 has 64 positions; 64 is out of range"):
        resnet.explain("conv1", 64)


class Cache(nn.Module):
    """Starts from an empty state, as streaming models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.register_buffer("state", torch.empty(0, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.state, self.linear(x)]).sum(0)


def test_an_axis_without_positions_has_a_reason() -> None:
    graph = stp_fx.analyze(stp_fx.trace(Cache().eval(), torch.randn(3, 4)))
    assert graph.pin_reasons("state:0") == ["an axis of length 0"]
    assert all(graph.pin_reasons(axis.name) for axis in graph.axes if not graph.groups)


def test_a_reason_is_said_once_for_all_its_nodes(vit: stp_fx.ChannelGraph) -> None:
    stream = next(group for group in vit.groups if not group.exact)
    names = [f"encoder_{name}" for name in ("layers_encoder_layer_0_ln_1", "layers_encoder_layer_0_ln_2", "ln")]
    assert stream.notes == (f"native_layer_norm normalises over it (nodes {', '.join(map(repr, names))})",)
