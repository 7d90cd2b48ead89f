"""``ChannelGraph.plan_for``: channels chosen by hand, and all that goes with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import fx, nn

import stp_fx
from stp_fx.errors import InputError, PlanError


def traced(model: nn.Module, *shape: int) -> fx.GraphModule:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr,operator]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr,operator]
    return stp_fx.trace(model.eval().double(), torch.zeros(*shape, dtype=torch.float64))


def check(gm: fx.GraphModule, plan: stp_fx.PrunePlan, *shape: int) -> fx.GraphModule:
    """The plan is complete and can be carried out, masked equals removed, and the survivors say what is left."""
    survivors = stp_fx.analyze(gm).survivors(plan)
    x = torch.randn(*shape, dtype=torch.float64)
    pruned, masked = stp_fx.apply_plan(gm, plan), stp_fx.apply_plan(gm, plan, mask=True)
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), masked(x), rtol=1e-9, atol=1e-9)
    cost = stp_fx.cost(pruned)
    assert (survivors.macs, survivors.params) == (cost.macs, cost.params)
    assert survivors.cost.per_node == cost.per_node
    for (name, dim), kept in survivors.axes.items():
        np.testing.assert_array_equal(kept, plan.kept[name, dim])
    return pruned


@pytest.fixture(scope="module")
def resnet() -> fx.GraphModule:
    return traced(torchvision.models.resnet18(weights=None, num_classes=10), 1, 3, 64, 64)


@pytest.fixture(scope="module")
def vit() -> fx.GraphModule:
    return traced(torchvision.models.VisionTransformer(32, 16, 1, 4, 32, 64, num_classes=5), 1, 3, 32, 32)


@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer1.0.conv1.weight", "layer1.0.conv1.weight:0", "layer1.0.bn1"])
def test_a_layer_is_named_in_several_ways(resnet: fx.GraphModule, name: str) -> None:
    plan = stp_fx.analyze(resnet).plan_for({name: [0, -1, 0]})
    assert plan.kept["layer1.0.conv1.weight", 0].tolist() == list(range(1, 63))
    assert plan.kept["layer1.0.conv2.weight", 1].tolist() == list(range(1, 63))
    assert len(plan.kept) == 6
    check(resnet, plan, 1, 3, 64, 64)


def test_a_residual_stage_goes_together_and_layers_add_up(resnet: fx.GraphModule) -> None:
    graph = stp_fx.analyze(resnet)
    plan = graph.plan_for({"layer1.1.conv2": [3], "layer1.0.conv1": [5], "fc.weight:1": [7]})
    assert plan.kept["conv1.weight", 0].tolist() == [k for k in range(64) if k != 3]
    assert plan.kept["layer2.0.downsample.0.weight", 1].tolist() == [k for k in range(64) if k != 3]
    assert 7 not in plan.kept["layer4.0.downsample.0.weight", 0]
    assert int((~graph.survivors(plan).units).sum()) == 3
    check(resnet, plan, 1, 3, 64, 64)


def test_nothing_named_is_an_empty_plan(resnet: fx.GraphModule) -> None:
    assert stp_fx.analyze(resnet).plan_for({}).is_empty
    assert stp_fx.analyze(resnet).plan_for({"conv1": []}).is_empty


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"fc": [1]}, r"graph output \(node 'output'\)"),
        ({"conv1.weight:2": [0]}, "kernel or spatial positions"),
        ({"conv1": [64]}, "index 64 is out of range for 'conv1.weight:0', an axis of 64 positions"),
        ({"conv1": [-65]}, "index -65 is out of range"),
        ({"conv1": [0.5]}, "flat sequence of integers"),
        ({"conv1": [[1]]}, "flat sequence of integers"),
        ({"conv1": 1}, "flat sequence of integers"),
        ({"conv1": [True] * 64}, "flat sequence of integers"),
        ({"conv1": [[1], [2, 3]]}, "flat sequence of integers"),
        ({"conv1": range(64)}, "removes all 64 positions of 'conv1.weight:0'; keep at least one"),
        ({"layer1.0.conv": [0]}, "did you mean .*'layer1.0.conv1'"),
        ({"layer1": [0]}, "name one of 'layer1.0.conv1.weight:0'"),
        ({5: [0]}, "got 5"),
        ([0], "give a mapping"),
    ],
)
def test_what_cannot_be_removed_says_why(resnet: fx.GraphModule, removed: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        stp_fx.analyze(resnet).plan_for(removed)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400


def test_a_head_goes_from_queries_keys_values_and_the_projection(vit: fx.GraphModule) -> None:
    graph, name = stp_fx.analyze(vit), "encoder.layers.encoder_layer_0.self_attention"
    by_queries = graph.plan_for({name: range(8, 16)})
    assert by_queries.kept[f"{name}.in_proj_weight", 0].tolist() == [k for k in range(96) if k // 8 not in (1, 5, 9)]
    assert by_queries.kept[f"{name}.out_proj.weight", 1].tolist() == [k for k in range(32) if k // 8 != 1]
    assert graph.plan_for({f"{name}.out_proj.weight:1": range(8, 16)}) == by_queries
    assert graph.plan_for({f"{name}.in_proj_bias": [*range(8, 16), *range(40, 48), *range(72, 80)]}) == by_queries
    check(vit, by_queries, 1, 3, 32, 32)


def test_all_heads_are_refused(vit: fx.GraphModule) -> None:
    with pytest.raises(InputError, match=r"removes all .* keep at least one"):
        stp_fx.analyze(vit).plan_for({"encoder.layers.encoder_layer_0.self_attention.out_proj.weight:1": range(32)})


def test_a_position_inside_every_head(vit: fx.GraphModule) -> None:
    graph, name = stp_fx.analyze(vit), "encoder.layers.encoder_layer_0.self_attention"
    plan = graph.plan_for({f"{name}.out_proj.weight:1": range(3, 32, 8)})
    assert plan.kept[f"{name}.out_proj.weight", 1].tolist() == [k for k in range(32) if k % 8 != 3]
    check(vit, plan, 1, 3, 32, 32)
    both = graph.plan_for({f"{name}.out_proj.weight:1": sorted({*range(3, 32, 8), *range(8, 16)})})
    assert both.kept[f"{name}.out_proj.weight", 1].tolist() == [k for k in range(32) if k % 8 != 3 and k // 8 != 1]
    check(vit, both, 1, 3, 32, 32)


@pytest.mark.parametrize("indices", [[9], range(8, 15), [*range(8, 16), 20]])
def test_part_of_a_head_names_what_would_go_together(vit: fx.GraphModule, indices: list[int]) -> None:
    name = "encoder.layers.encoder_layer_0.self_attention.out_proj.weight:1"
    first = 20 if 20 in indices else indices[0]
    head, inside = first // 8, ", ".join(str(8 * k + first % 8) for k in range(4))
    with pytest.raises(InputError, match=rf"position {first} .* is not removed alone") as caught:
        stp_fx.analyze(vit).plan_for({name: indices})
    assert f"{8 * head}..{8 * head + 7} (unit {head} of group" in str(caught.value)
    assert f"{inside} (unit {first % 8} of group" in str(caught.value)


class Convs(nn.Module):
    """A depthwise and a grouped convolution, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.grouped, self.last = nn.Conv2d(8, 12, 1, groups=2), nn.Linear(12 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.depthwise(self.first(x).relu()).relu())
        return self.last(x.relu().flatten(1))


@pytest.fixture(scope="module")
def convs() -> fx.GraphModule:
    return traced(Convs(), 2, 3, 4, 4)


def test_a_unit_named_in_part_goes_whole(convs: fx.GraphModule) -> None:
    graph = stp_fx.analyze(convs)
    groups = [g for g in graph.groups if any(m.axis.tensor == "last.weight" for m in g.members)]
    assert len(groups) == 2  # group by channel inside it
    with pytest.raises(InputError, match="not removed alone"):
        graph.plan_for({"grouped": [0]})
    plan = graph.plan_for({"grouped": [1, 7]})
    assert plan.kept["last.weight", 1].tolist() == [k for k in range(48) if k // 4 not in (1, 7)]
    check(convs, plan, 2, 3, 4, 4)
    plain = traced(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(), nn.Linear(24, 2)), 2, 3, 2, 2)
    plan = stp_fx.analyze(plain).plan_for({"2.weight:1": [5]})
    assert plan.kept["0.weight", 0].tolist() == [0, 2, 3, 4, 5]
    assert plan.kept["2.weight", 1].tolist() == [k for k in range(24) if k // 4 != 1]
    check(plain, plan, 2, 3, 2, 2)


def test_depthwise_channels_belong_to_a_conv_group_and_a_place_in_it(convs: fx.GraphModule) -> None:
    graph = stp_fx.analyze(convs)
    plan = graph.plan_for({"depthwise": [2, 6]})
    assert plan == graph.plan_for({"first": [2, 6]})
    assert plan.kept["grouped.weight", 1].tolist() == [0, 1, 3]
    check(convs, plan, 2, 3, 4, 4)
    whole = graph.plan_for({"depthwise": range(4)})
    assert whole.kept["grouped.weight", 0].tolist() == list(range(6, 12))
    check(convs, whole, 2, 3, 4, 4)


class Sliced(nn.Module):
    """Two heads of four, of which a slice takes seven positions."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.heads, self.out = nn.Linear(3, 6), nn.Parameter(torch.randn(2, 3, 4)), nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bhc,hco->bho", self.into(x).unflatten(-1, (2, 3)), self.heads)
        return self.out(y.flatten(1)[:, :7])


def test_a_slice_of_a_product_hides_no_column() -> None:
    """The last column has one position in the slice; it is dead with the first head, and lives on in the weight."""
    gm = traced(Sliced(), 2, 3)
    graph = stp_fx.analyze(gm)
    head = graph.plan_for({"out.weight:1": range(4)})
    assert head.kept["heads", 0].tolist() == [1]
    assert ("heads", 2) not in head.kept
    assert int((~graph.survivors(head).units).sum()) == 1
    check(gm, head, 2, 3)
    column = graph.plan_for({"out.weight:1": [3]})
    assert column.kept["heads", 2].tolist() == [0, 1, 2]
    assert column.kept["out.weight", 1].tolist() == [0, 1, 2, 4, 5, 6]
    check(gm, column, 2, 3)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.one, self.two, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.two(self.one(self.into(x)).relu()))


def test_tied_weights_go_under_either_name() -> None:
    gm = traced(Tied(), 2, 3)
    graph = stp_fx.analyze(gm)
    assert graph.first_name("two.weight") == "one.weight"
    plan = graph.plan_for({"two": [1]})
    assert plan == graph.plan_for({"two.weight:0": [1]}) == graph.plan_for({"one": [1]})
    assert ("two.weight", 0) not in plan.kept
    survivors = graph.survivors(plan)
    assert survivors.kept("two.weight", 0).tolist() == survivors.kept("one.weight", 0).tolist() == [0, 2, 3, 4, 5]
    pruned = check(gm, plan, 2, 3)
    assert pruned.get_parameter("two.weight") is pruned.get_parameter("one.weight")


def test_a_masked_graph_is_cut_further_by_hand(resnet: fx.GraphModule) -> None:
    first = stp_fx.analyze(resnet).plan_for({"layer1.0.conv1": [0, 1]})
    masked = stp_fx.apply_plan(resnet, first, mask=True)
    second = stp_fx.analyze(masked).plan_for({"layer1.0.conv1": [1, 2]})
    assert {name for name, _ in second.kept} == {name for name, _ in first.kept}
    pruned = stp_fx.apply_plan(masked, second)
    assert stp_fx.plan_of(pruned).kept["layer1.0.conv1.weight", 0].tolist() == [0, *range(3, 64)]
    twice = stp_fx.apply_plan(masked, second, mask=True)
    assert (
        stp_fx.cost(twice).macs
        == stp_fx.analyze(resnet).survivors(stp_fx.analyze(resnet).plan_for({"layer1.0.conv1": [0, 1, 2]})).macs
    )


class Turned(nn.Module):
    """Two parts of one layer's outputs that change places."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.into(x).split([2, 4], 1)
        return self.out(torch.cat([two, one.relu()], 1))


def test_no_part_of_a_tensor_may_lose_everything() -> None:
    gm = traced(Turned(), 2, 3)
    graph = stp_fx.analyze(gm)
    assert sorted(len(units) for units in graph.pieces()) == [2, 4, 6, 6]
    with pytest.raises(InputError, match="removes all 2 channels of a part of a tensor"):
        graph.plan_for({"into": [0, 1, 2]})
    check(gm, graph.plan_for({"into": [0, 2, 3]}), 2, 3)


def test_plans_by_flags(resnet: fx.GraphModule) -> None:
    graph = stp_fx.analyze(resnet)
    removed = np.zeros(graph.units, dtype=bool)
    removed[graph.groups[1].units[:3]] = True
    plan = graph.plan_removing(removed)
    np.testing.assert_array_equal(graph.survivors(plan).units, ~removed)
    for wrong in (removed[:-1], removed.astype(np.int64)):
        with pytest.raises(InputError, match=f"one bool for each of the {graph.units} units"):
            graph.plan_removing(wrong)


def test_plans_that_do_not_fit_name_the_axis(resnet: fx.GraphModule) -> None:
    graph = stp_fx.analyze(resnet)
    whole = graph.plan_for({"layer1.0.conv1": [0]})

    def changed(drop: tuple[str, int], kept: object = None, size: int = 64) -> stp_fx.PrunePlan:
        entries = {key: value for key, value in whole.kept.items() if key != drop}
        extra = {} if kept is None else {drop: kept}
        return stp_fx.PrunePlan({**entries, **extra}, {key: size if key == drop else 64 for key in (*entries, *extra)})  # type: ignore[dict-item]

    out = ("layer1.0.conv1.weight", 0)
    with pytest.raises(PlanError, match=r"incomplete plan: no entry for 'layer1.0.conv1.weight' dim 0, which these channels"):
        graph.survivors(changed(out))
    assert graph.survivors(changed(out), partial=True).macs == graph.survivors(whole).macs
    with pytest.raises(PlanError, match="coupled axes disagree"):
        graph.survivors(changed(out, list(range(63))))
    with pytest.raises(PlanError, match="has 64 positions; the plan is for an axis of 70"):
        graph.survivors(changed(out, list(range(1, 64)), 70))
    with pytest.raises(PlanError, match="'nowhere' dim 0, but the graph has no such axis"):
        graph.survivors(stp_fx.PrunePlan({("nowhere", 0): [0]}, {("nowhere", 0): 2}))
    with pytest.raises(PlanError, match=r"pinned position 3 of 'fc.bias' dim 0; it is pinned: graph output"):
        graph.survivors(stp_fx.PrunePlan({("fc.bias", 0): [0, 1, 2, 4, 5, 6, 7, 8, 9]}, {("fc.bias", 0): 10}))
