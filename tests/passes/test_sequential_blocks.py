"""Sequential repair of networks without some of their blocks: the layer before a run of them stands for the run."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import stp_fx
from stp_fx.analysis.build import analyze
from stp_fx.errors import InputError
from stp_fx.passes import MaskBlocks, Pipeline, ReconstructSequentially, RemoveBlocks, SelectBlocks
from stp_fx.rewrite.without_blocks import ends_of_runs


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(x)).relu())


class Stream(nn.Module):
    """Branches one after the other; with ``beside`` each is computed beside another one from the same value."""

    def __init__(self, depth: int = 4, width: int = 8, beside: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.layers = nn.ModuleList(Branch(width) for _ in range(depth))
        self.others = nn.ModuleList(Branch(width) for _ in range(depth)) if beside else None
        self.last = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for k, layer in enumerate(self.layers):
            x = x + layer(x) if self.others is None else x + layer(x) + self.others[k](x)
        return self.last(x)


def stream(**options: bool) -> tuple[fx.GraphModule, list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model = Stream(**options).double().eval()
    data = [torch.randn(256, 5, dtype=torch.double) for _ in range(2)]
    return stp_fx.trace(model, data[0][:2]), data, torch.randn(128, 5, dtype=torch.double)


def removing(gm: fx.GraphModule, *names: str) -> stp_fx.PrunePlan:
    return stp_fx.plan_of(RemoveBlocks(names)(gm).graph_module)


def sums(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if node.name.startswith("add")]


def test_what_stands_for_a_run() -> None:
    gm, *_ = stream()
    graph, (first, second, third, fourth) = analyze(gm), sums(gm)
    assert ends_of_runs(gm, graph, removing(gm, "layers.1")) == {first: second}
    assert ends_of_runs(gm, graph, removing(gm, "layers.1", "layers.2", "layers.3")) == {
        first: fourth, second: fourth, third: fourth
    }  # fmt: skip
    assert ends_of_runs(gm, graph, removing(gm, "layers.0", "layers.2")) == {"first": first, second: third}
    assert ends_of_runs(gm, graph, stp_fx.PrunePlan({}, {})) == {}


def test_a_value_that_another_branch_reads_stands_for_itself() -> None:
    gm, *_ = stream(beside=True)
    assert ends_of_runs(gm, analyze(gm), removing(gm, "layers.1")) == {}


@pytest.mark.parametrize(
    "names", [("layers.0",), ("layers.1",), ("layers.1", "layers.2"), ("layers.3",), ("layers.0", "layers.2")]
)
def test_the_layer_before_a_run_is_the_regression_of_its_end(names: tuple[str, ...]) -> None:
    """By hand, for the one layer: everything before it is as in the original, so it is a plain least-squares problem."""
    gm, data, _ = stream()
    plan = removing(gm, *names)
    before = int(names[0][-1]) - 1
    layer = "first" if before < 0 else f"layers.{before}.down"
    repaired = ReconstructSequentially(data, plan=plan)(gm).graph_module
    seen: dict[str, list[torch.Tensor]] = {"input": [], "other": [], "end": []}
    run = [k for k in range(4) if f"layers.{k}" in names]
    end = next(k for k in run if k + 1 not in run)
    for batch in data:
        env = _values(gm, batch)
        target = env["first"] if before < 0 else env[f"layers_{before}_down"]
        seen["input"].append(batch if before < 0 else env[f"relu_{before}" if before else "relu"])
        seen["other"].append(torch.zeros_like(target) if before < 0 else env[sums(gm)[before]] - target)
        seen["end"].append(env[sums(gm)[end]])
    x, other, wish = (torch.cat(seen[key]) for key in ("input", "other", "end"))
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    best = torch.linalg.lstsq(torch.cat([x, ones], 1), wish - other).solution
    least = (torch.cat([x, ones], 1) @ best + other - wish).square().mean()
    ours = repaired.get_submodule(layer)
    theirs = gm.get_submodule(layer)
    reached, plain = ((module(x) + other - wish).square().mean() for module in (ours, theirs))
    assert least <= reached <= 1.05 * least < plain, (least, reached, plain)


def _values(gm: fx.GraphModule, *args: torch.Tensor) -> dict[str, torch.Tensor]:
    class Kept(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found[n.name] = super().run_node(n)
            return found[n.name]

    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        Kept(gm).run(*args)
    return found


@pytest.mark.parametrize("merge", [True, False])
def test_the_output_comes_nearer_and_masked_is_removed(merge: bool) -> None:
    gm, data, x = stream()
    for names in (("layers.1",), ("layers.0", "layers.1"), ("layers.2", "layers.3")):
        plan = removing(gm, *names)
        repaired = ReconstructSequentially(data, merge=merge, plan=plan)(gm).graph_module
        removed, masked = (each(plan.blocks)(repaired).graph_module for each in (RemoveBlocks, MaskBlocks))
        torch.testing.assert_close(removed(x), masked(x), rtol=1e-10, atol=1e-12)
        plain, wanted = stp_fx.apply_plan(gm, plan)(x), gm(x)
        assert (removed(x) - wanted).square().mean() < (0.5 if merge else 1.0) * (plain - wanted).square().mean()


def test_in_a_pipeline_after_the_choice_of_blocks() -> None:
    gm, data, x = stream()
    repaired = Pipeline(SelectBlocks(0.25, "blocks", "output", data), ReconstructSequentially(data), RemoveBlocks())(
        gm
    ).graph_module
    plain = Pipeline(SelectBlocks(0.25, "blocks", "output", data), RemoveBlocks())(gm).graph_module
    assert stp_fx.plan_of(repaired).blocks == stp_fx.plan_of(plain).blocks
    assert (repaired(x) - gm(x)).square().mean() < 0.5 * (plain(x) - gm(x)).square().mean()


def test_blocks_and_channels_together() -> None:
    gm, data, x = stream()
    shorter = RemoveBlocks(("layers.1",))(gm).graph_module
    plan = stp_fx.plan_of(stp_fx.prune_graph(shorter, "magnitude", 0.25, ignore=("first",)))
    repaired = ReconstructSequentially(data, plan=plan)(gm).graph_module
    small, masked = stp_fx.apply_plan(repaired, plan), stp_fx.apply_plan(repaired, plan, mask=True)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-10, atol=1e-12)
    plain = stp_fx.apply_plan(gm, plan)
    assert (small(x) - gm(x)).square().mean() < (plain(x) - gm(x)).square().mean()


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="merge"):
        ReconstructSequentially([], merge=1)  # type: ignore[arg-type]
