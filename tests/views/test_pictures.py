"""The three views against the analysis, and one layout for all of them."""

from __future__ import annotations

import json
import shutil
import subprocess

import networkx as nx
import pytest
import torch
import torchvision
from torch import nn

import stp_fx
from stp_fx.analysis.drawing import drawing
from stp_fx.errors import InputError
from stp_fx.views import dot_text
from stp_fx.views import network as network_of
from stp_fx.views.picture import quoted

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's dot is not installed")


def network(graph: stp_fx.ChannelGraph, fold: int | None = None) -> nx.MultiDiGraph:
    return network_of(drawing(graph._solved), fold)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.add(self.a(x).relu(), x))


@pytest.fixture(scope="module")
def graph() -> stp_fx.ChannelGraph:
    return stp_fx.analyze(stp_fx.trace(Residual().eval(), torch.zeros(1, 3, 8, 8)))


def edges(graph: stp_fx.ChannelGraph, relation: str) -> set[tuple[str, str]]:
    return {(s, t) for s, t, d in network(graph).edges(data=True) if d["relation"] == relation}


def test_flow_is_the_graph_and_coupling_is_what_the_analysis_found(graph: stp_fx.ChannelGraph) -> None:
    inner = {("stem", "a"), ("a", "relu"), ("relu", "add"), ("stem", "add"), ("add", "head")}
    assert edges(graph, "flow") == inner | {("x", "stem"), ("head", "output")}
    assert edges(graph, "direct") == inner
    assert edges(graph, "forced") == {("relu", "stem")}


def test_folding_leaves_one_node_a_call_of_a_module() -> None:
    gm = stp_fx.trace(
        nn.Sequential(Residual(), nn.Sequential(nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1))).eval(), torch.zeros(1, 3, 8, 8)
    )
    nodes = network(stp_fx.analyze(gm), fold=1).nodes
    assert [data["label"] for _, data in nodes(data=True)] == ["input_1", "0", "1", "output"]


class Repeats(nn.Module):
    """Calls one block twice, and one activation three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.act = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), nn.ReLU()
        self.shift = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.block(x)) + self.shift.view(-1, x.shape[1] // x.shape[1], 1)
        return self.act(self.block(self.act(y)))


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_every_call_of_a_repeated_module_is_a_node(frontend: str) -> None:
    graph = stp_fx.analyze(stp_fx.trace(Repeats().eval(), torch.zeros(1, 4, 8, 8), frontend=frontend))
    whole = network(graph, fold=0)
    assert sum("relu" in data["label"].lower() for _, data in whole.nodes(data=True)) == 3
    folded = network(graph, fold=1)
    assert [data["label"] for _, data in folded.nodes(data=True) if data["kind"] == "module (folded)"] == [
        "block",
        "block\ncall 2",
    ]
    assert nx.is_directed_acyclic_graph(nx.DiGraph((s, t) for s, t, d in folded.edges(data=True) if d["relation"] == "flow"))


def test_numbers_are_no_nodes_and_the_parameter_stands_with_its_reader() -> None:
    graph = stp_fx.analyze(stp_fx.trace(Repeats().eval(), torch.zeros(1, 4, 8, 8)))
    whole = {data["label"].split("\n")[0] for _, data in network(graph, fold=0).nodes(data=True)}
    assert "shift" in whole
    assert not {name for name in whole if "floordiv" in name or "size" in name}
    assert "shift" not in {data["label"].split("\n")[0] for _, data in network(graph, fold=1).nodes(data=True)}


def test_what_only_continues_a_call_stands_with_it() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(8, 4, 1))
    graph = stp_fx.analyze(stp_fx.trace(layers.eval(), torch.zeros(1, 3, 8, 8)))
    labels = [data["label"] for _, data in network(graph, fold=2).nodes(data=True)]
    assert labels == ["input_1", "0\nConv2d, BatchNorm2d, ReLU, 2 more", "5\nConv2d", "output"]
    assert len(network(graph, fold=0)) == 8


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "swin_t", "vit_b_16", "mobilenet_v2", "googlenet"])
def test_networks_fit_a_page(name: str) -> None:
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None, **extra).eval()
    graph = stp_fx.analyze(stp_fx.trace(model, torch.zeros(1, 3, 224, 224, device="meta")))
    assert 15 <= len(network(graph)) <= 60


@needs_dot
def test_odd_characters_in_names_are_text_in_the_picture(tmp_path) -> None:
    net = nn.Sequential()
    net.add_module("<b>naïve & co", nn.Conv2d(3, 4, 1))
    graph = stp_fx.analyze(stp_fx.trace(net.eval(), torch.zeros(1, 3, 8, 8)))
    assert "&lt;b&gt;naïve &amp; co" in graph.draw(tmp_path / "odd.svg").read_text(encoding="utf-8")


def test_quotes_and_backslashes_do_not_end_a_label() -> None:
    assert quoted('a"b\\n\nc') == '"a\\"b\\\\n\\nc"'


def test_clusters_are_the_groups_and_the_legend_names_what_is_there(graph: stp_fx.ChannelGraph) -> None:
    text = dot_text(drawing(graph._solved), "combined")
    cluster = text[text.index("subgraph") : text.index("}", text.index("subgraph"))].replace("\N{NO-BREAK SPACE}", "")
    assert "stem.weight:0\\n8 units" in cluster
    assert text.count("subgraph") == 1
    assert all(f'label="{label}' in cluster for label in ("stem\\nConv2d", "a\\nConv2d", "relu", "add"))
    assert 'label="head' not in cluster
    assert all(word in text for word in ("convolution", "join", "data flow", "direct coupling", "forced shape match"))
    assert "normalisation" not in text


def test_folded_modules_name_their_groups_and_plans_their_share() -> None:
    layers = nn.Sequential(Residual(), nn.Sequential(nn.Conv2d(5, 6, 1), nn.Conv2d(6, 5, 1)))
    gm = stp_fx.trace(layers.eval(), torch.zeros(1, 3, 8, 8))
    graph = stp_fx.analyze(gm)
    text = dot_text(drawing(graph._solved), fold=1)
    assert 'label="0\\n0.head.weight:0: 5 units\\nstem.weight:0: 8 units"' in text
    assert 'label="1\\n0.weight:0: 6 units"' in text
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.5))
    assert "stem.weight:0: 8 units, 50% removed" in dot_text(drawing(graph._solved, graph.survivors(plan).units), fold=1)


class Shifted(nn.Module):
    """Adds the numbers of the positions, and puts two halves together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + torch.arange(x.shape[2]).float().mul(0.1)
        return self.last(torch.cat([x[..., 0::2], x[..., 1::2]], -1))


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_helpers_are_left_out(frontend: str) -> None:
    graph = stp_fx.analyze(stp_fx.trace(Shifted().eval(), torch.zeros(1, 3, 8), frontend=frontend))
    labels = [data["label"].split("\n")[0] for _, data in network(graph).nodes(data=True)]
    assert not [label for label in labels if "arange" in label or "getitem" in label]
    assert {"fx": {"first", "last"}, "export": {"conv1d", "last_bias"}}[frontend] <= set(labels)
    whole = [data["label"] for _, data in network(graph, fold=0).nodes(data=True)]
    assert sum("arange" in label for label in whole) == 1
    assert nx.is_directed_acyclic_graph(nx.DiGraph(edges(graph, "flow")))


def test_a_call_that_touches_two_groups_is_marked() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1))
    nodes = network(stp_fx.analyze(stp_fx.trace(layers.eval(), torch.zeros(1, 3, 8, 8)))).nodes(data=True)
    assert {data["label"].split("\n")[0]: len(data["groups"]) for _, data in nodes} == {
        "input_1": 0,
        "0": 1,
        "1": 2,
        "2": 1,
        "output": 0,
    }


@needs_dot
def test_all_views_place_every_node_alike_and_show_their_own_edges(graph: stp_fx.ChannelGraph) -> None:
    places, shown = [], []
    for view in ("computational", "dependency", "combined"):
        out = subprocess.run(
            ["dot", "-Tjson"], input=dot_text(drawing(graph._solved), view).encode(), capture_output=True, check=True
        ).stdout
        laid = json.loads(out)
        places.append({o["name"]: o["pos"] for o in laid["objects"] if "pos" in o})
        shown.append(sum(e.get("style") != "invis" for e in laid["edges"]))
    assert places[0] == places[1] == places[2]
    assert shown == [7, 6, 13]


@needs_dot
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_are_of_the_format_asked_for(graph: stp_fx.ChannelGraph, tmp_path, suffix: str) -> None:
    written = graph.draw(tmp_path / f"g.{suffix}")
    assert {"png": b"PNG", "svg": b"<svg", "pdf": b"%PDF"}[suffix] in written.read_bytes()


def test_without_dot_the_text_and_how_to_install_it(graph: stp_fx.ChannelGraph, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="apt-get install graphviz"):
        written = graph.draw(tmp_path / "g.svg", "combined")
    assert written == tmp_path / "g.dot"
    assert written.read_text() == dot_text(drawing(graph._solved), "combined")
    assert graph._repr_svg_() is None


def test_bad_requests_are_named(graph: stp_fx.ChannelGraph, tmp_path) -> None:
    with pytest.raises(InputError, match=r"\.svg or \.pdf"):
        graph.draw(tmp_path / "g.jpg")
    with pytest.raises(InputError, match="'dependency'"):
        graph.draw(tmp_path / "g.svg", "sideways")
    with pytest.raises(InputError, match="-1"):
        graph.draw(tmp_path / "g.svg", fold=-1)
    assert not list(tmp_path.iterdir())
