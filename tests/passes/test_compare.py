"""``stp_fx.compare``: costs, sizes, channels, compensation and latency of two graphs, in every form."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
import torchvision
from rich.console import Console
from torch import fx, nn

import stp_fx
from stp_fx.errors import InputError
from stp_fx.passes import MaskChannels
from stp_fx.report.file_size import safetensors_bytes
from stp_fx.report.paired import paired_latency
from stp_fx.report.tables import bytes_text, seconds_text


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.body(torch.relu(self.stem(x))))).mean((2, 3)))


@pytest.fixture
def gm() -> fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.trace(Net().eval(), torch.randn(2, 3, 8, 8))


@pytest.fixture
def pruned(gm: fx.GraphModule) -> fx.GraphModule:
    return stp_fx.prune_graph(gm, ratios={"body": 0.25})


def test_costs_sizes_and_groups(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    report = stp_fx.compare(gm, pruned)
    assert (report.before, report.after) == (stp_fx.cost(gm), stp_fx.cost(pruned))
    assert [(g.name, g.before, g.after) for g in report.groups] == [("stem.weight:0", 8, 4), ("body.weight:0", 16, 12)]
    assert report.latency is None
    for size, graph in zip(report.size, (gm, pruned), strict=True):
        assert size == len(safetensors.torch.save(graph.state_dict()))


def test_what_a_group_saves_alone(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    stem, body = stp_fx.compare(gm, pruned).groups
    one = stp_fx.prune_graph(gm, ratios={"stem": 0.5, "body": 0.0})
    assert stem.macs == stp_fx.cost(gm).macs - stp_fx.cost(one).macs
    assert stem.params == stp_fx.cost(gm).params - stp_fx.cost(one).params
    total = stp_fx.cost(gm).macs - stp_fx.cost(pruned).macs
    assert stem.macs + body.macs > total > max(stem.macs, body.macs)


def test_a_graph_beside_itself(gm: fx.GraphModule) -> None:
    report = stp_fx.compare(gm, gm)
    assert report.groups == ()
    assert report.before == report.after
    assert "No group has lost units." in str(report)
    assert "No group" not in report.to_markdown()


def test_units_are_counted_in_what_came_before(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    """Plans hold original indices; a graph that was pruned before has other ones."""
    twice = stp_fx.prune_graph(pruned, ratio=0.5)
    counted = {g.name: (g.before, g.after) for g in stp_fx.compare(pruned, twice).groups}
    assert counted == {"stem.weight:0": (4, 2), "body.weight:0": (12, 6)}
    counted = {g.name: (g.before, g.after) for g in stp_fx.compare(gm, twice).groups}
    assert counted == {"stem.weight:0": (8, 2), "body.weight:0": (16, 6)}


def test_masked_units_do_not_count(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    second = stp_fx.plan_of(pruned)
    masked = MaskChannels(second)(gm).graph_module
    removed = {g.name: (g.before, g.after, g.macs, g.params) for g in stp_fx.compare(gm, pruned).groups}
    assert {g.name: (g.before, g.after, g.macs, g.params) for g in stp_fx.compare(gm, masked).groups} == removed
    smaller = stp_fx.prune_graph(pruned, ratio=0.5)
    plan = stp_fx.plan_of(smaller).after(stp_fx.plan_of(pruned))
    both = MaskChannels(plan)(pruned).graph_module
    assert [(g.before, g.after) for g in stp_fx.compare(gm, both).groups] == [(8, 2), (16, 6)]
    assert stp_fx.compare(masked, smaller).groups[0].before == 4


@pytest.mark.parametrize("compensation", ["mean", "least_squares"])
def test_compensated_groups_are_marked(gm: fx.GraphModule, compensation: str) -> None:
    data = [torch.randn(4, 3, 8, 8)]
    pruned = stp_fx.prune_graph(gm, ratios={"body": 0.0}, calibration=data, compensation=compensation)
    report = stp_fx.compare(gm, pruned)
    assert [(g.name, g.compensation) for g in report.groups] == [("stem.weight:0", compensation)]
    assert compensation.replace("_", " ") in str(report)
    assert report.to_dict()["groups"][0]["compensation"] == compensation


def test_what_nobody_compensated_or_recorded(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    assert {g.compensation for g in stp_fx.compare(gm, pruned).groups} == {"no"}
    fresh = stp_fx.trace(Net().eval(), torch.randn(2, 3, 8, 8))
    applied = stp_fx.compare(fresh, stp_fx.apply_plan(fresh, stp_fx.plan_of(pruned)))
    assert {g.compensation for g in applied.groups} == {None}
    assert "not recorded" in str(applied)


def test_heads_that_meet_in_a_product_are_compensated_where_they_are_read() -> None:
    model = torchvision.models.VisionTransformer(32, 16, 1, 4, 32, 64, num_classes=5).eval()
    gm = stp_fx.trace(model, torch.randn(1, 3, 32, 32))
    pruned = stp_fx.prune_graph(gm, products="inner", calibration=[torch.randn(8, 3, 32, 32)], compensation="mean")
    marks = {g.name: g.compensation for g in stp_fx.compare(gm, pruned).groups}
    qkv = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight:0"
    assert marks[qkv + "#2"] == "no"  # queries and keys: read by each other, no weight to change
    assert marks[qkv + "#3"] == "mean"
    assert marks["encoder.layers.encoder_layer_0.mlp.0.weight:0"] == "mean"


def test_latency_of_both_in_turn(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    report = stp_fx.compare(gm, pruned, latency=torch.randn(4, 3, 16, 16))
    assert report.latency is not None
    assert len(report.latency.before) == len(report.latency.after) > 1
    assert all(s > 0 for s in (*report.latency.before, *report.latency.after))
    assert report.latency.inputs == ("4×3×16×16",)
    assert "latency" in str(report)
    assert "4×3×16×16" in report.to_markdown()
    assert report.to_dict()["seconds"]["before"] == report.latency.medians[0]
    recorded = stp_fx.compare(gm, pruned, latency=True).latency
    assert recorded is not None
    assert recorded.inputs == ("2×3×8×8",)


def test_latency_measures_the_right_way_round() -> None:
    wide, narrow = (stp_fx.trace(nn.Linear(size, size), torch.randn(64, size)) for size in (768, 32))
    # Five tries: a machine with other work may stop either of the two for long.
    assert any(paired_latency(wide, wide).left == pytest.approx(1.0, abs=0.5) for _ in range(5))
    example = torch.randn(64, 768), torch.randn(64, 32)
    slow = paired_latency(wide, wide, example[0], rounds=3).medians[0]
    assert paired_latency(narrow, narrow, example[1], rounds=3).medians[0] < slow


def test_training_mode_is_left_as_it_was(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    pruned.train()
    stp_fx.compare(gm, pruned, latency=True)
    assert pruned.training
    assert not gm.training


def test_every_form_says_the_same(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    report = stp_fx.compare(gm, pruned)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["macs"] == {"before": report.before.macs, "after": report.after.macs, "left": pytest.approx(data["macs"]["left"])}
    assert data["bytes"]["after"] == report.size[1]
    assert data["groups"][1]["units"] == {"before": 16, "after": 12, "left": 0.75}
    assert data["groups"][0]["saved_alone"]["macs"] == report.groups[0].macs
    markdown = report.to_markdown().splitlines()
    assert markdown[1] == "| --- | ---: | ---: | ---: |"
    assert any(line.startswith("| body.weight:0 | 12/16 | 75% |") for line in markdown)
    assert f"{report.after.macs:,}" in str(report)
    assert "12/16" in str(report)


def test_a_terminal_of_80_columns_shows_whole_names(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    console = Console(width=80, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(stp_fx.compare(gm, pruned))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("stem.weight:0 ") for line in lines)


def test_graphs_that_do_not_belong_together(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    with pytest.raises(InputError, match="positions that the first has not"):
        stp_fx.compare(pruned, gm)
    other = stp_fx.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), torch.randn(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"has no 'stem.weight', so it does not come from the first"):
        stp_fx.compare(gm, other)
    wider = Net()
    wider.body, wider.norm, wider.head = nn.Conv2d(8, 20, 3, padding=1), nn.BatchNorm2d(20), nn.Linear(20, 5)
    with pytest.raises(InputError, match=r"'body.weight' dim 0 has 20 positions"):
        stp_fx.compare(gm, stp_fx.trace(wider.eval(), torch.randn(2, 3, 8, 8)))


def test_inputs_that_the_graph_does_not_run_on(gm: fx.GraphModule, pruned: fx.GraphModule) -> None:
    with pytest.raises(InputError, match=r"does not run on an input of 1×4×8×8"):
        stp_fx.compare(gm, pruned, latency=torch.randn(1, 4, 8, 8))
    with pytest.raises(InputError, match="at least one round"):
        paired_latency(gm, pruned, rounds=0)


def test_size_on_disk_is_what_safetensors_writes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.half, self.double = nn.Linear(3, 5).half(), nn.Linear(7, 11).double()
            self.tied = self.half
            self.register_buffer("flags", torch.ones(13, dtype=torch.bool))
            self.register_buffer("count", torch.tensor(1))
            self.register_buffer("passing", torch.ones(99), persistent=False)

    module = Mixed()
    state = {name: value for name, value in module.state_dict().items() if not name.startswith("tied")}
    assert safetensors_bytes(module) == len(safetensors.torch.save(state))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(999), "999 B"),
        (bytes_text(46_807_448), "46.8 MB"),
        (bytes_text(12_345_678_901), "12.35 GB"),
        (seconds_text(12.5e-6), "12.5 µs"),
        (seconds_text(0.0337), "33.7 ms"),
        (seconds_text(2.5), "2.5 s"),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected


def test_plot_has_a_bar_for_every_group_that_lost_units(gm: fx.GraphModule, pruned: fx.GraphModule, tmp_path) -> None:
    written = stp_fx.compare(gm, pruned).plot(tmp_path / "kept.svg")
    assert "body.weight:0  12/16" in written.read_text()
    assert stp_fx.compare(gm, gm).plot(tmp_path / "same.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"the suffix must be one of .*\.svg"):
        stp_fx.compare(gm, pruned).plot(tmp_path / "kept.nothing")
