"""The explorer's data against the analysis and the graphs that they describe; the page as text. The browser has its own file."""

from __future__ import annotations

import base64
import html.parser
import itertools
import json
import re
from importlib import resources
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.errors import InputError, PlanError
from stp_fx.report.explored import runs_of
from stp_fx.views.boxes import PALETTE, boxes, colours
from stp_fx.views.page import page


class Attention(nn.Module):
    """Heads (a product), a residual sum, a fixed table, and a mask that is made of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        mask = (torch.ones(5, 5).tril() - 1.0) * 100.0
        return x + self.out(((q @ k.transpose(-1, -2) + mask.cos()).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(3, 8), nn.ModuleList(Attention() for _ in range(layers)), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def traced(layers: int = 2) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.trace(Net(layers).double().eval(), torch.randn(2, 5, 3, dtype=torch.float64), validate=False)


@pytest.fixture(scope="module")
def gm() -> torch.fx.GraphModule:
    return traced()


@pytest.fixture(scope="module")
def pruned(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    return stp_fx.prune_graph(gm, ratio=0.5, validate=False)


def decoded(runs: list[list[int]]) -> list[tuple[int, int]]:
    return [(at + k, unit + step * k) for at, count, unit, step in runs for k in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_runs_hold_every_position_and_its_unit(seed: int) -> None:
    draws = np.random.default_rng(seed)
    parts = [np.arange(5), np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3), draws.integers(0, 6, 7), np.arange(6)[::-1]]
    unit = np.concatenate([parts[k] for k in draws.permutation(len(parts))[: draws.integers(1, 6)]]).astype(np.int64)
    index = np.sort(draws.choice(2 * len(unit), len(unit), replace=False)).astype(np.int64) if seed % 2 else np.arange(len(unit))
    runs = runs_of(index, unit)
    assert runs is not None
    assert decoded(runs) == list(zip(index.tolist(), unit.tolist(), strict=True))


def test_regular_positions_take_few_runs_and_irregular_ones_are_left_out() -> None:
    assert runs_of(np.arange(8192), np.arange(8192)) == [[0, 8192, 0, 1]]
    assert runs_of(np.arange(98), np.repeat(np.arange(2), 49)) == [[0, 49, 0, 0], [49, 49, 1, 0]]
    assert runs_of(np.arange(0, 20_000, 2), np.arange(10_000)) is None


def test_groups_and_axes_are_those_of_the_analysis(gm: torch.fx.GraphModule) -> None:
    data, graph = stp_fx.explore(gm).data, stp_fx.analyze(gm)
    axes = data["axes"]
    assert [axis["name"] for axis in axes] == [axis.name for axis in graph.axes]
    for shown, group in zip(data["groups"], graph.groups, strict=True):
        found = {axes[axis]["name"]: decoded(data["maps"][at]) for axis, at in shown["members"]}
        assert found == {m.axis.name: list(zip(m.index.tolist(), m.unit.tolist(), strict=True)) for m in group.members}
    for axis in axes:
        held = {p for g in graph.groups for m in g.members if m.axis.name == axis["name"] for p in m.index.tolist()}
        assert axis["pinned"] == axis["size"] - len(held)
        assert [data["reasons"][k] for k in axis["why"]] == (graph.pin_reasons(axis["name"]) if axis["pinned"] else [])


def test_costs_of_the_boxes_add_up_to_those_of_both_graphs(gm: torch.fx.GraphModule, pruned: torch.fx.GraphModule) -> None:
    data = stp_fx.explore(gm, pruned=pruned).data
    before, after = stp_fx.cost(gm), stp_fx.cost(pruned)
    assert [sum(box["macs"][k] for box in data["boxes"]) for k in (0, 1)] == [before.macs, after.macs]
    assert [sum(box["params"][k] for box in data["boxes"]) for k in (0, 1)] == [before.params, after.params]
    totals = {row["name"]: row["values"] for row in data["totals"]}
    assert (totals["MACs"], totals["parameters"]) == ([before.macs, after.macs], [before.params, after.params])
    tensors = dict(pruned.named_parameters()) | dict(pruned.named_buffers())
    for axis in data["axes"]:
        tensor, _, dim = axis["name"].rpartition(":")
        assert axis["kept"] == tensors[tensor].shape[int(dim)]
    assert json.loads(data["plan"]) == json.loads(stp_fx.plan_of(pruned).to_json())


def test_units_that_are_kept_are_those_of_the_plan(gm: torch.fx.GraphModule) -> None:
    graph = stp_fx.analyze(gm)
    plan = graph.plan_for({"stem": [1, 5]})
    data = stp_fx.explore(gm, plan=plan).data
    flags = graph.survivors(plan).units
    for shown, group in zip(data["groups"], graph.groups, strict=True):
        kept = flags[group.units]
        left = np.ones(group.size)
        if shown["left"] is not None:
            left = np.unpackbits(np.frombuffer(base64.b64decode(shown["left"]), np.uint8))
        assert left[: group.size].astype(bool).tolist() == kept.tolist()
        assert (shown["kept"], shown["of"]) == (kept.sum(), group.size)
    stem = next(group for group in data["groups"] if group["name"] == "stem.weight:0")
    assert (stem["kept"], stem["of"]) == (6, 8)


def test_masks_show_as_removed_and_a_pruned_graph_alone_knows_what_it_was(
    gm: torch.fx.GraphModule, pruned: torch.fx.GraphModule
) -> None:
    plan = stp_fx.analyze(gm).plan_for({"stem": [1, 5]})
    masked = stp_fx.explore(stp_fx.apply_plan(gm, plan, mask=True)).data
    assert [(g["kept"], g["of"]) for g in masked["groups"] if g["name"] == "stem.weight:0"] == [(6, 8)]
    assert not any(axis["name"].startswith("stp_fx_dead") for axis in masked["axes"])
    alone = stp_fx.explore(pruned).data
    assert [(g["kept"], g["of"]) for g in alone["groups"] if g["name"] == "stem.weight:0"] == [(4, 8)]
    assert {row["name"]: row["values"] for row in alone["totals"]}["MACs"] == [stp_fx.cost(gm).macs, stp_fx.cost(pruned).macs]


def test_artifacts_give_scores_damage_curves_and_the_plan(gm: torch.fx.GraphModule) -> None:
    made = stp_fx.passes
    data = [torch.randn(8, 5, 3, dtype=torch.float64) for _ in range(2)]
    selection = stp_fx.Selection(0.5)
    steps = made.CollectStatistics(data, covariance=True, maps=True, patches=64), made.ScoreUnits("magnitude")
    artifacts = made.Pipeline(*steps, made.MeasureDamage(data), made.SelectUnits(selection))(gm).artifacts
    found = stp_fx.explore(gm, artifacts=artifacts).data
    assert artifacts.damages is not None
    assert artifacts.scores is not None
    for shown in found["groups"]:
        curve = artifacts.damages.curves[shown["name"]]
        assert shown["damage"] == [[k, pytest.approx(value)] for k, value in enumerate(curve.tolist())]
        (values,) = (v for g, v in zip(artifacts.scores.groups, artifacts.scores.values, strict=True) if g.name == shown["name"])
        assert shown["scores"] == [float(values.min()), float(values.max())]
    assert any(group["kept"] < group["of"] for group in found["groups"])
    with pytest.raises(InputError, match="another graph"):
        stp_fx.explore(traced(1), artifacts=artifacts)


def test_latency_is_measured_for_both_graphs(gm: torch.fx.GraphModule, pruned: torch.fx.GraphModule) -> None:
    data = stp_fx.explore(gm, pruned=pruned, latency=True).data
    for k in (0, 1):
        assert sum(box["seconds"][k] for box in data["boxes"]) > 0
    assert [row["unit"] for row in data["totals"] if row["name"] == "latency"] == ["s"]


# -- boxes ------------------------------------------------------------------------------------------------------------


def test_boxes_are_chains_in_modules_and_a_row_of_modules_is_one(gm: torch.fx.GraphModule) -> None:
    found = boxes(stp_fx.analyze(traced(5)).drawing())
    titles = [(scope.title, scope.parent) for scope in found.scopes]
    assert titles[0] == ("layers.0 to 4", -1)
    assert [(title, found.scopes[parent].title) for title, parent in titles if title.startswith("layers.") and parent == 0] == [
        (f"layers.{k}", "layers.0 to 4") for k in range(5)
    ]
    assert [scope.title for scope in boxes(stp_fx.analyze(gm).drawing()).scopes if scope.parent < 0] == ["layers.0", "layers.1"]
    names = [call.name for box in found.boxes for call in box.calls]
    assert len(names) == len(set(names))
    assert {"x", "output", "stem", "head"} <= set(names)


def test_what_is_made_of_constants_alone_stands_together(gm: torch.fx.GraphModule) -> None:
    found = boxes(stp_fx.analyze(gm).drawing())
    made = [k for k, scope in enumerate(found.scopes) if scope.title == "preparation"]
    inside = {call.call for box in found.boxes if box.scope in made for call in box.calls}
    assert inside <= {"ones", "tril", "sub", "mul", "cos"}
    assert all(not box.touched for box in found.boxes if box.scope in made)


def test_groups_that_meet_have_different_colours() -> None:
    layers = [nn.Conv2d(3 if k == 0 else 4, 4, 1) for k in range(14)]
    found = boxes(stp_fx.analyze(stp_fx.trace(nn.Sequential(*layers).eval(), torch.zeros(1, 3, 4, 4))).drawing())
    colour = colours(found, 13)
    assert len(set(colour)) == PALETTE
    assert all(one != other for one, other in itertools.pairwise(colour))
    many = Dense().eval()
    found = boxes(stp_fx.analyze(stp_fx.trace(many, torch.zeros(1, 3, 4, 4))).drawing())
    colour = colours(found, 12)
    assert sorted(colour) == list(range(12))


class Dense(nn.Module):
    """Twelve groups that meet in one concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.last = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(12)), nn.Conv2d(48, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([part(x) for part in self.parts], 1))


# -- the page ---------------------------------------------------------------------------------------------------------


class Elements(html.parser.HTMLParser):
    """The elements of a page: tag, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][2].append(data)


ODD = """<b>"it's" & </script><script>alert(1)</script> %%DATA%% é\u2028"""


def test_names_are_text_in_the_page_and_nothing_is_loaded() -> None:
    data = {**stp_fx.explore(traced(1)).data, "title": ODD}
    plain, odd = Elements(page({**data, "title": "plain"})).found, Elements(page(data)).found
    assert [tag for tag, *_ in odd] == [tag for tag, *_ in plain]
    (found,) = ("".join(text) for tag, attributes, text in odd if attributes.get("id") == "data")
    assert json.loads(found) == json.loads(json.dumps(data))
    assert next("".join(text) for tag, _, text in odd if tag == "title").rstrip("\n") == ODD
    for _, attributes, _ in odd:
        assert not attributes.keys() & {"src", "href"}
    policy = next(a["content"] for _, a, _ in odd if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_a_notebook_shows_the_page_in_a_frame_and_a_file_holds_it(tmp_path: Any) -> None:
    made = stp_fx.explore(traced(1), tmp_path / "net.html", title=ODD)
    text = (tmp_path / "net.html").read_text(encoding="utf-8")
    assert text == made.to_html()
    ((tag, attributes, _),) = Elements(made._repr_html_()).found
    assert (tag, attributes["srcdoc"]) == ("iframe", text)
    assert attributes["sandbox"] == "allow-scripts allow-downloads"
    assert repr(stp_fx.explore(traced(1), title="net")).startswith("Explorer('net': ")


def test_the_licence_of_what_is_taken_along_is_there() -> None:
    licence = (resources.files("stp_fx.views") / "explorer" / "dagre.LICENSE").read_text()
    assert "Permission is hereby granted, free of charge" in licence


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """That of WCAG 2.2: 3 is enough for lines, 4.5 for text."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_stand_out_from_the_page_and_numbers_from_them(theme: int) -> None:
    style = (resources.files("stp_fx.views") / "explorer" / "page.css").read_text()
    values = dict(re.findall(r"--(\w+): (#\w{6});", style.split("}")[theme]))
    shades = [values[f"g{k}"] for k in range(PALETTE)]
    assert len(set(shades)) == PALETTE
    assert min(contrast(shade, values[back]) for shade in shades for back in ("page", "back", "box", "frame")) >= 3
    assert min(contrast(shade, values["on"]) for shade in shades) >= 4.5
    assert min(contrast(values["soft"], values[back]) for back in ("page", "back", "box")) >= 4.5


def test_bad_requests_are_named(gm: torch.fx.GraphModule, pruned: torch.fx.GraphModule, tmp_path: Any) -> None:
    plan = stp_fx.plan_of(pruned)
    for request, said in (
        ({"path": tmp_path / "net.svg"}, "must end in .html"),
        ({"pruned": pruned, "plan": plan}, "not both"),
        ({"plan": {"stem": [1]}}, "give a PrunePlan"),
        ({"artifacts": 3}, "give those of an Outcome"),
        ({"latency": "yes"}, "latency"),
        ({"pruned": traced(1)}, "does not come from the first"),
    ):
        with pytest.raises(InputError, match=said):
            stp_fx.explore(gm, **request)
    with pytest.raises(InputError, match="not a graph that stp_fx"):
        stp_fx.explore(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())))
    with pytest.raises(PlanError):
        stp_fx.explore(gm, plan=stp_fx.PrunePlan({("other", 0): [0]}, {("other", 0): 4}))
    with torch.device("meta"):
        empty = stp_fx.trace(Net(1), torch.zeros(2, 5, 3), validate=False)
    with pytest.raises(InputError, match="meta device"):
        stp_fx.explore(empty, latency=True)
    assert not list(tmp_path.iterdir())


def test_edges_carry_the_groups_that_both_ends_have(gm: torch.fx.GraphModule) -> None:
    found = boxes(stp_fx.analyze(gm).drawing())
    names = [group.name for group in stp_fx.analyze(gm).groups]
    ends = {(found.boxes[s].first.path, found.boxes[t].first.path): {names[k] for k in groups} for s, t, groups in found.edges}
    assert ends["stem", "layers.0.norm"] == {"stem.weight:0"}
    assert ends["layers.0.norm", "layers.0.qkv"] == {"stem.weight:0"}
    assert ends["", "head"] == {"stem.weight:0"}


def test_what_a_function_reads_of_parameters_counts_as_the_boxes_own() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(3, 8), nn.Parameter(torch.zeros(4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.first(x).relu(), self.weight)

    found = boxes(stp_fx.analyze(stp_fx.trace(Functional().eval(), torch.zeros(2, 3), validate=False)).drawing())
    assert [
        (found.boxes[s].first.call, sorted(groups)) for s, t, groups in found.edges if found.boxes[t].first.call == "linear"
    ] == [("Linear", [0])]
