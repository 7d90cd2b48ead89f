"""Costs of single units, against costing the plan that removes one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from criteria_networks import Attention, Case, ConvNet, Mlp, measured, traced
from torch import fx, nn

import stp_fx
from stp_fx.analysis.cost import parameter_names
from stp_fx.analysis.unit_costs import contraction_macs, group_costs, parameter_elements, unit_savings
from stp_fx.criteria import ActivationBytes, CostAware, Latency, Macs, Params, ScoreContext, Table
from stp_fx.errors import CriterionError, InputError
from stp_fx.measure.latency import latency_work, node_seconds


class Mixed(nn.Module):
    """Grouped, depthwise and transposed convolutions, a channel shuffle, a concatenation and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.side = nn.Conv2d(6, 5, 1)
        self.tied = nn.Linear(11, 11)
        self.head = nn.Linear(11, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depth(torch.relu(self.grouped(torch.relu(self.stem(x))))))
        x = torch.relu(self.up(x))
        x = torch.cat([x, self.side(x)], 1).mean((2, 3))
        return self.head(self.tied(torch.relu(self.tied(x))))


def networks() -> dict[str, fx.GraphModule]:
    return {
        "conv": traced(ConvNet), "attention": traced(Attention), "mlp": traced(Mlp),
        "mixed": stp_fx.trace(Mixed(), torch.randn(2, 3, 6, 6)),
    }  # fmt: skip


def context_of(gm: fx.GraphModule) -> ScoreContext:
    return ScoreContext({**dict(gm.named_parameters()), **dict(gm.named_buffers())}, 0, gm)


def differences(gm: fx.GraphModule, what: str) -> np.ndarray:
    """Cost of the graph less that of the graph without each unit, one plan after the other."""
    graph = stp_fx.analyze(gm)
    saved = []
    for unit in [None, *range(graph.units)]:
        removed = np.zeros(graph.units, dtype=bool)
        removed[[] if unit is None else [unit]] = True
        saved.append(getattr(graph.survivors_without(removed), what))
    return saved[0] - np.array(saved[1:], dtype=float)


@pytest.mark.parametrize("name", ["conv", "attention", "mlp", "mixed"])
def test_savings_are_exact(name: str) -> None:
    gm = networks()[name]
    graph = stp_fx.analyze(gm)
    np.testing.assert_allclose(unit_savings(graph, contraction_macs(graph)), differences(gm, "macs"), rtol=1e-12)
    work = parameter_elements(graph, parameter_names(gm))
    np.testing.assert_allclose(unit_savings(graph, work), differences(gm, "params"), rtol=1e-12)


@pytest.mark.parametrize("name", ["conv", "attention", "mlp", "mixed"])
def test_group_costs_are_those_of_one_unit(name: str) -> None:
    gm = networks()[name]
    for model, what in ((Macs(), "macs"), (Params(), "params")):
        saved = differences(gm, what)
        expected = [saved[group.units].mean() for group in stp_fx.analyze(gm).groups]
        np.testing.assert_allclose(model(context_of(gm), "unit"), expected, rtol=1e-12)


def test_a_layer_costs_all_that_its_units_are_part_of() -> None:
    gm = traced(Mlp)
    # 2 inputs through 5-7-6-4
    assert Macs()(context_of(gm), "layer").tolist() == [2 * (35 + 42), 2 * (42 + 24)]
    assert Macs()(context_of(gm), "unit") == pytest.approx([2 * (5 + 6), 2 * (7 + 4)])
    assert Params()(context_of(gm), "unit") == pytest.approx([5 + 1 + 6, 7 + 1 + 4])
    assert Params()(context_of(gm), "layer").tolist() == [35 + 7 + 42, 42 + 6 + 24]
    # float64, two samples, each layer's output before and after its activation
    assert ActivationBytes()(context_of(gm), "unit") == pytest.approx([2 * 8 * 2, 2 * 8 * 2])
    assert ActivationBytes()(context_of(gm), "layer").tolist() == [7 * 2 * 8 * 2, 6 * 2 * 8 * 2]


@pytest.mark.slow
def test_a_deep_network_is_costed_in_one_walk() -> None:
    torchvision = pytest.importorskip("torchvision")
    gm = stp_fx.trace(torchvision.models.resnet50(), torch.randn(1, 3, 64, 64))
    graph = stp_fx.analyze(gm)
    saved = unit_savings(graph, contraction_macs(graph))
    whole = stp_fx.cost(gm).macs
    for group in graph.groups[::6]:
        removed = np.zeros(graph.units, dtype=bool)
        removed[group.units[-1]] = True
        left = graph.survivors_without(removed).macs
        assert whole - left == pytest.approx(saved[group.units[-1]], rel=1e-9)


def test_latency_is_shared_out_by_work() -> None:
    gm = traced(ConvNet).train()
    graph, seconds = stp_fx.analyze(gm), node_seconds(gm, 3)
    assert all(module.training for module in gm.modules())
    assert set(seconds) == {n.name for n in gm.graph.nodes if n.op.startswith("call")}
    assert min(seconds.values()) > 0
    work = list(latency_work(graph, seconds))
    total = sum(piece.amount for piece in work)
    assert total == pytest.approx(sum(seconds.values()))
    costs = group_costs(graph, work, "unit")
    # an inner unit: its share of the layer that makes it, of the one that reads it, and of what lies between
    index = next(g.index for g in graph.groups if g.name == "inner.weight:0")
    assert costs[index] == pytest.approx(sum(seconds[n] for n in ("inner", "inner_norm", "relu", "outer")) / 8)
    assert group_costs(graph, work, "layer").max() <= total
    assert (Latency(3)(context_of(gm), "unit") > 0).all()


def test_latency_leaves_the_graph_and_the_random_state_alone() -> None:
    gm = traced(ConvNet)
    state, values = torch.random.get_rng_state(), {k: v.clone() for k, v in gm.state_dict().items()}
    Latency(1)(context_of(gm), "unit")
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in gm.state_dict().items():
        assert torch.equal(value, values[name])


def test_tables_by_group_layer_and_module() -> None:
    gm = traced(ConvNet)
    context, names = context_of(gm), [group.name for group in stp_fx.analyze(gm).groups]
    assert names == ["stem.weight:0", "inner.weight:0"]
    assert Table({"stem.weight:0": 3, "inner.weight": 2.5})(context, "unit").tolist() == [3.0, 2.5]
    # both layers that write the residual stream, by module
    assert Table({"stem": 1, "outer": 4, "inner": 2})(context, "layer").tolist() == [5.0, 2.0]
    with pytest.raises(CriterionError, match=r"neither group 'inner.weight:0' nor a layer that gives its units \(inner.weight\)"):
        Table({"stem": 1})(context, "unit")


@pytest.mark.parametrize("bad", [-1, math.inf, math.nan, "3", True])
def test_bad_costs(bad: object) -> None:
    with pytest.raises(InputError, match="'a'"):
        Table({"a": bad})  # type: ignore[dict-item]


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "3"])
def test_bad_runs(bad: object) -> None:
    with pytest.raises(InputError, match="runs"):
        Latency(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [Macs(), Params(), ActivationBytes(), Latency(1), Table({"stem": 1, "outer": 1, "inner": 3})])
@pytest.mark.parametrize("per", ["unit", "layer"])
def test_every_cost_serves_the_criterion(model: object, per: str) -> None:
    case: Case = measured(ConvNet)
    costs = model(case.context, per)  # type: ignore[operator]
    assert costs.shape == (2,)
    assert (costs > 0).all()
    scores = case.scores(CostAware(cost=model, per=per))  # type: ignore[arg-type]
    assert all(np.isfinite(values).all() for values in scores.values())
    stp_fx.prune_graph(case.gm, CostAware(cost=model, per=per), 0.5, scope="global")  # type: ignore[arg-type]
