"""``ChannelGraph`` as others see it: short reprs, names and globs, no solver outside, no reference to the graph."""

from __future__ import annotations

import gc
import html.parser
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import fx, nn

import stp_fx
from stp_fx.analysis.names import entries_of, groups_named, outputs_named, prunable_groups
from stp_fx.errors import InputError

ROOT = Path(stp_fx.__file__).parent


def on_meta(name: str, size: int = 224) -> fx.GraphModule:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None).eval()
    return stp_fx.trace(model, torch.zeros(1, 3, size, size, device="meta"))


@pytest.fixture(scope="module")
def resnet() -> fx.GraphModule:
    return on_meta("resnet18", 64)


# -- reprs -----------------------------------------------------------------------------------------------------------


class Text(html.parser.HTMLParser):
    """What a page shows; fails on a tag that is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.shown: list[str] = []
        self.rows = 0
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def shown(gm: fx.GraphModule) -> list[Any]:
    graph = stp_fx.analyze(gm)
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, "random", ratio=0.5))
    largest = max(graph.groups, key=lambda group: len(group.members))
    members = max(largest.members, key=lambda member: len(member.index)), largest.members[-1]
    survivors = graph.survivors(plan)
    return [graph, *graph.groups, *members, *graph.axes, *graph.products, plan, survivors, survivors.cost, stp_fx.cost(gm)]


@pytest.mark.parametrize("name", ["resnet152", "densenet201", "vit_b_16"])
def test_reprs_fit_a_screen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)  # the picture is tested with the pictures
    for value in shown(on_meta(name)):
        lines = repr(value).splitlines()
        assert 1 <= len(lines) <= 20
        assert max(map(len, lines)) <= 160
        assert lines[0].startswith(type(value).__name__)
        assert Text(value._repr_html_()).rows <= 20


def test_reprs_say_what_counts(resnet: fx.GraphModule) -> None:
    graph = stp_fx.analyze(resnet)
    assert repr(graph) == "ChannelGraph(12 groups, 2880 units over 157 axes; 3 reasons for pinned axes)"
    assert repr(graph.groups[1]) == "Group(1, 'layer1.0.conv1.weight:0', 64 units on 6 axes)"
    assert repr(graph.groups[1].members[0]) == "Member('layer1.0.conv1.weight:0', 64 of 64 positions in 64 units)"
    assert repr(graph.axes[0]) == "Axis('conv1.weight:0', 64 positions, weight out)"
    plan = graph.plan_for({"layer1.0.conv1": [0, 1]})
    assert repr(plan) == "PrunePlan(6 axes of 6 tensors shortened, 12 of 384 indices removed)"
    assert repr(graph.survivors(plan)) == "Survivors(2878 of 2880 units kept, 6 axes shortened)"
    assert graph.summary().splitlines()[1] == "  conv1.weight:0 64 units, 19 axes"


def test_names_are_escaped() -> None:
    net = nn.Sequential()
    net.add_module("<b>&", nn.Conv2d(3, 4, 1))
    net.add_module("last", nn.Conv2d(4, 2, 1))
    gm = stp_fx.trace(net.eval(), torch.zeros(1, 3, 8, 8))
    graph = stp_fx.analyze(gm)
    plan = graph.plan_for({"<b>&": [0]})
    for value in (
        graph,
        graph.groups[0],
        graph.groups[0].members[0],
        graph.axes[0],
        plan,
        graph.survivors(plan),
        stp_fx.cost(gm),
    ):
        page = value._repr_html_()
        assert "<b>" not in page
        assert "://" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
        assert "<b>&" in "".join(Text(page).shown) or value is not graph


# -- names -----------------------------------------------------------------------------------------------------------


def names(groups: list[Any]) -> list[str]:
    return [group.name for group in groups]


def test_a_glob_names_all_that_it_matches(resnet: fx.GraphModule) -> None:
    graph = stp_fx.analyze(resnet)
    convs = [f"layer{k}.{j}.conv1" for k in (1, 2, 3, 4) for j in (0, 1)]
    assert groups_named(resnet, graph, "layer*.conv1", "ignore") == groups_named(resnet, graph, convs, "ignore")
    assert names(outputs_named(resnet, graph, "layer?.0.conv1", "ratios")) == [f"layer{k}.0.conv1.weight:0" for k in (1, 2, 3, 4)]
    assert len(prunable_groups(resnet, graph, ["layer[12]*"])) == 6
    assert groups_named(resnet, graph, "*.bn1.bias", "ignore") == outputs_named(resnet, graph, "layer*.conv1", "ratios")
    assert groups_named(resnet, graph, "layer1.0.conv1.weight:[0]", "ignore") == [graph.groups[1]]


def test_modules_and_sequences_of_them(resnet: fx.GraphModule) -> None:
    graph = stp_fx.analyze(resnet)
    convs = [resnet.get_submodule("layer1.0.conv1"), "layer2.0.conv1"]
    assert names(outputs_named(resnet, graph, convs, "ratios")) == ["layer1.0.conv1.weight:0", "layer2.0.conv1.weight:0"]
    held = [resnet.get_submodule("layer1"), (resnet.get_submodule("layer2"), ["layer3"])]
    assert prunable_groups(resnet, graph, held) == prunable_groups(resnet, graph, ["layer1", "layer2", "layer3"])
    assert entries_of(["a", ("b", ["c"])], "ignore") == ("a", "b", "c")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (5, "`ignore` holds 5: give parameter names"),
        (["conv1", 5], "`ignore` holds 5: give parameter names"),
        (None, "`ignore` holds None"),
        ("layer9*", "the glob 'layer9[*]', which matches nothing in the graph; did you mean 'layer"),
        ("qq*", r"the glob 'qq[*]', which matches nothing in the graph(\n|$)"),
        ("conv2", "`ignore` names 'conv2', which the graph does not have; did you mean"),
        (nn.Linear(3, 3), "a Linear that is not part of the graph"),
    ],
)
def test_what_names_nothing_is_refused(resnet: fx.GraphModule, entry: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prunable_groups(resnet, stp_fx.analyze(resnet), entry)
    with pytest.raises(InputError, match=message):
        stp_fx.prune_graph(resnet, "random", ignore=entry)


def test_ratios_by_glob_mean_outputs(resnet: fx.GraphModule) -> None:
    pruned = stp_fx.prune_graph(resnet, "random", ratio=0, ratios={"layer1.*.conv1": 0.25, "layer2.0.conv?": 0.5})
    sizes = {f"layer{k}.{j}": pruned.get_parameter(f"layer{k}.{j}.conv1.weight").shape[0] for k in (1, 2) for j in (0, 1)}
    assert sizes == {"layer1.0": 48, "layer1.1": 48, "layer2.0": 64, "layer2.1": 128}
    assert pruned.get_parameter("layer2.1.conv2.weight").shape[:2] == (64, 128)


# -- what stays inside -----------------------------------------------------------------------------------------------


def test_the_solved_analysis_is_read_in_its_folder_alone() -> None:
    reading = [path for path in ROOT.rglob("*.py") if re.search(r"(?<!self)\._solved\b", path.read_text(encoding="utf-8"))]
    assert reading
    assert all(path.parent.name == "analysis" for path in reading)


def test_pictures_and_tables_are_imported_where_they_are_made() -> None:
    code = """
import sys, torch, torchvision
before = set(sys.modules)
import stp_fx
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
pruned = stp_fx.prune_graph(net, example_inputs=torch.zeros(1, 3))
repr(stp_fx.analyze(pruned))
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} & {"networkx", "pydot", "matplotlib", "rich"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.split() == []


def test_the_graph_module_is_not_kept_alive() -> None:
    gm = stp_fx.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3))
    graph, known = stp_fx.analyze(gm), weakref.ref(gm)
    weight = weakref.ref(gm.get_parameter("0.weight"))
    survivors = graph.survivors(graph.plan_for({"0": [1]}))
    del gm
    gc.collect()
    assert known() is None
    assert weight() is None
    assert survivors.params < graph.survivors().params
