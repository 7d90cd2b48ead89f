"""Compensation against what each consumer computes by itself, in double precision, on the calibration data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import stp_fx
from stp_fx.analysis.consumers import Consumer, find_consumers
from stp_fx.criteria import Magnitude
from stp_fx.errors import InputError, PassError
from stp_fx.passes import (
    CollectStatistics,
    CompensateLeastSquares,
    CompensateMean,
    MaskChannels,
    Pipeline,
    RemoveChannels,
    ScoreUnits,
    SelectUnits,
)


class Convolutions(nn.Module):
    """Every kind of convolution, with and without bias, norms and depthwise convolutions between."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 16, 3, padding=1, stride=2, bias=False)
        self.n = nn.BatchNorm2d(16)
        self.c = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4)
        self.d = nn.Conv2d(16, 16, 3, groups=16, padding=1)
        self.e = nn.Conv2d(16, 8, 1, bias=False)
        self.r = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.t = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.u = nn.ConvTranspose2d(8, 8, 3, stride=2)
        self.f = nn.Linear(8, 10, bias=False)
        self.g = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.n(self.b(F.relu(self.a(x)))))
        x = F.relu6(self.d(F.gelu(self.c(x)) + 0.5))
        x = F.silu(self.r(F.relu(self.e(x))))
        x = F.silu(self.u(F.relu(self.t(x))))
        return self.g(F.relu(self.f(x.mean((2, 3)))))


class Lines(nn.Module):
    """One and three dimensions."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        conv: Any = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
        self.a, self.b, self.c = conv(2, 8, 3, padding=1), conv(8, 8, 3, padding=1), conv(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.relu(self.b(F.gelu(self.a(x)))))


class Tokens(nn.Module):
    """Attention, weights read by functions, by a product, computed from others, and used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.up, self.shared = nn.Linear(12, 16), nn.Linear(16, 16)
        self.matrix = nn.Parameter(torch.randn(16, 10))
        self.derived = nn.Parameter(torch.randn(12, 10))
        self.down = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x, need_weights=False)[0]
        x = F.relu(self.up(x))
        x = F.relu(self.shared(F.gelu(self.shared(x))))
        x = F.relu(x @ self.matrix)
        return self.down(F.relu(F.linear(x, self.derived * 2)))


SHAPES: dict[str, tuple[type[nn.Module] | Any, tuple[int, ...]]] = {
    "convolutions": (Convolutions, (6, 3, 12, 12)),
    "lines": (lambda: Lines(1), (6, 2, 9)),
    "volumes": (lambda: Lines(3), (4, 2, 5, 5, 5)),
    "tokens": (Tokens, (6, 7, 12)),
}


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return value.clone() if isinstance(value, torch.Tensor) else value


class Setting:
    """A network, calibration data, a plan, and every consumer's input and output on that data."""

    def __init__(self, name: str, ratio: float = 0.5) -> None:
        torch.manual_seed(0)
        make, shape = SHAPES[name]
        net = make().double().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        self.batches = [torch.randn(shape, dtype=torch.float64) + 0.3 for _ in range(3)]
        self.gm = stp_fx.trace(net, self.batches[0])
        collect = CollectStatistics(self.batches, covariance=True, maps=True, patches=2000)
        self.made = Pipeline(collect, ScoreUnits("random"), SelectUnits(ratio, products="inner"))(self.gm).artifacts
        assert self.made.plan is not None
        self.plan = self.made.plan
        graph = stp_fx.analyze(self.gm)
        survivors = graph.survivors(self.plan)
        self.values = self._values()
        self.losing: list[tuple[Consumer, torch.Tensor]] = []
        for consumer in find_consumers(self.gm):
            site = consumer.site
            dead = ~survivors.flags(graph.value(site.source).dims[site.dim])
            if dead.any():
                self.losing.append((consumer, torch.from_numpy(np.flatnonzero(dead))))

    def _values(self) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            runs = []
            for batch in self.batches:
                recorder = _Recorder(self.gm)
                recorder.run(batch)
                runs.append({node.name: value for node, value in recorder.env.items()})
        return {k: torch.cat([r[k] for r in runs]) for k, v in runs[0].items() if isinstance(v, torch.Tensor) and v.dim() > 1}

    def outputs(self, gm: fx.GraphModule, consumer: Consumer, dead: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The consumer's output when the dead inputs read zero, in ``gm``, and what it was; both behind a norm that took
        the shift."""
        read = self.values[consumer.site.source].index_fill(consumer.site.dim, dead, 0.0)
        nodes = {node.name: node for node in gm.graph.nodes}
        last = nodes[consumer.node]
        after = next((u for u in last.users if u.op == "call_module" and "n" in str(u.target)[:2]), None)
        added = next((u for u in last.users if u.name.startswith("add") and u.name not in self.values), None)
        end = after or added or last
        source, env = nodes[consumer.site.source], {}
        with torch.no_grad():
            interpreter = fx.Interpreter(gm, garbage_collect_values=False)
            for node in gm.graph.nodes:
                if node is source:
                    env[node] = read
                elif node.op == "get_attr" or (node.all_input_nodes and all(n in env for n in node.all_input_nodes)):
                    interpreter.env = env
                    env[node] = interpreter.run_node(node)
                if node is end:
                    break
        name = consumer.node if end is not after else end.name
        return env[end], self.values[name]


def _errors(setting: Setting, gm: fx.GraphModule) -> dict[str, tuple[float, float]]:
    """Consumer to (largest shift of a channel's mean, mean squared error)."""
    found = {}
    for consumer, dead in setting.losing:
        now, before = setting.outputs(gm, consumer, dead)
        others = [k for k in range(now.dim()) if k != consumer.channel % now.dim()]
        shift = (now.mean(others) - before.mean(others)).abs().max() / before.abs().mean()
        found[consumer.node] = (float(shift), float((now - before).square().mean()))
    return found


@pytest.fixture(scope="module", params=list(SHAPES))
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param)


def test_mean_restores_every_consumers_mean(setting: Setting) -> None:
    before = _errors(setting, setting.gm)
    after = _errors(setting, CompensateMean()(setting.gm, setting.made).graph_module)
    shared = {"shared", "shared_1"}  # one bias for two uses: only their average can be right
    assert len(after) >= 2
    for node, (shift, _) in after.items():
        assert before[node][0] > 1e-3, node
        assert node in shared or shift < 1e-9, node


def test_least_squares_is_never_worse_than_the_mean_nor_that_than_none(setting: Setting) -> None:
    none = _errors(setting, setting.gm)
    mean = _errors(setting, CompensateMean()(setting.gm, setting.made).graph_module)
    best = _errors(setting, CompensateLeastSquares(ridge=1e-6)(setting.gm, setting.made).graph_module)
    for node, (shift, error) in best.items():
        if node in {"shared", "shared_1"}:
            continue
        assert error <= mean[node][1] * (1 + 1e-9), node
        assert mean[node][1] <= none[node][1] * (1 + 1e-9), node
        assert shift < 1e-9, node
    assert any(best[n][1] < 0.9 * mean[n][1] for n in best)


def test_shared_weights_are_right_on_average() -> None:
    setting = Setting("tokens")
    for correction in (CompensateMean(), CompensateLeastSquares()):
        gm = correction(setting.gm, setting.made).graph_module
        pairs = [setting.outputs(gm, c, dead) for c, dead in setting.losing if c.node in {"shared", "shared_1"}]
        total = sum((now - before).mean((0, 1)) for now, before in pairs)
        assert float(total.abs().max()) < 1e-9


@pytest.mark.parametrize("correction", [CompensateMean(), CompensateLeastSquares()])
def test_masking_and_removing_are_one_after_compensation(setting: Setting, correction: CompensateMean) -> None:
    gm = correction(setting.gm, setting.made).graph_module
    removed, masked = RemoveChannels(setting.plan)(gm).graph_module, MaskChannels(setting.plan)(gm).graph_module
    x = setting.batches[0]
    assert torch.allclose(removed(x), masked(x), rtol=1e-9, atol=1e-12)
    again = RemoveChannels(setting.plan)(masked).graph_module
    assert torch.allclose(again(x), removed(x), rtol=1e-12)
    assert stp_fx.plan_of(removed) == setting.plan


def test_the_input_graph_is_untouched(setting: Setting) -> None:
    before = {k: v.clone() for k, v in setting.gm.state_dict().items()}
    CompensateLeastSquares()(setting.gm, setting.made)
    after = setting.gm.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_shift_goes_into_the_norm_where_there_is_one_and_else_into_a_bias() -> None:
    setting = Setting("convolutions")
    gm = CompensateMean()(setting.gm, setting.made).graph_module
    assert gm.get_submodule("b").bias is None
    assert not torch.equal(gm.get_buffer("n.running_mean"), setting.gm.get_buffer("n.running_mean"))
    assert gm.get_parameter("f.bias").shape == (10,)
    assert torch.equal(gm.get_buffer("n.running_var"), setting.gm.get_buffer("n.running_var"))


def test_a_constant_channel_is_compensated_exactly_at_the_borders_mean() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 3, padding=1)).double().eval()
    with torch.no_grad():
        net[0].weight[1] = 0.0
        net[0].bias[1] = 1.0
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    gm = stp_fx.trace(net, x)
    plan = stp_fx.PrunePlan(
        {("0.weight", 0): [0], ("0.bias", 0): [0], ("1.weight", 1): [0]},
        {("0.weight", 0): 2, ("0.bias", 0): 2, ("1.weight", 1): 2},
    )
    # without maps: a constant channel needs none
    pruned = Pipeline(CollectStatistics([x]), CompensateMean(plan), RemoveChannels())(gm).graph_module
    assert torch.allclose(pruned(x).mean((0, 2, 3)), net(x).mean((0, 2, 3)), rtol=1e-12)


class Joined(nn.Module):
    """Two groups that meet in one consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.last = nn.Linear(6, 20), nn.Linear(20, 8), nn.Linear(20, 8), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        return self.last(F.gelu(torch.cat((self.left(x), self.right(x)), -1)))


@pytest.mark.parametrize("correction", [CompensateMean, lambda: CompensateLeastSquares(ridge=1e-12)])
def test_corrections_that_meet_in_one_consumer_compose_in_any_order(correction: Any) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(50, 6, dtype=torch.float64) for _ in range(2)]
    gm = stp_fx.trace(Joined().double().eval(), batches[0])

    def run(*steps: dict[str, float]) -> torch.Tensor:
        current = gm
        for ratios in steps:
            collect = CollectStatistics(batches, covariance=True, maps=True)
            select = SelectUnits(0.0, ratios=ratios)
            score = ScoreUnits(Magnitude(reduction="first"), ("stem",))
            pipeline = Pipeline(collect, score, select, correction(), MaskChannels())
            current = pipeline(current).graph_module
        return current(batches[0])

    together = run({"left": 0.5, "right": 0.5})
    assert torch.allclose(run({"left": 0.5}, {"right": 0.5}), together, rtol=1e-6)
    assert torch.allclose(run({"right": 0.5}, {"left": 0.5}), together, rtol=1e-6)


def test_through_prune_graph() -> None:
    setting = Setting("convolutions")
    losses = {}
    for compensation in (None, "mean", "least_squares"):
        pruned = stp_fx.prune_graph(setting.gm, "magnitude", 0.5, calibration=setting.batches, compensation=compensation)
        with torch.no_grad():
            losses[compensation] = float((pruned(setting.batches[0]) - setting.gm(setting.batches[0])).square().mean())
    assert losses["mean"] < losses[None]
    assert losses["least_squares"] < losses[None]


class Bare(nn.Module):
    """Linear all through, and its calls have no place for a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Conv2d(3, 8, 3, bias=False), nn.Parameter(torch.randn(8, 8, 1, 1))
        self.last = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.conv2d(self.first(x), self.weight))


def test_a_second_compensation_adds_to_the_bias_that_the_first_one_made() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64) + 1
    model = Bare().double().eval()
    gm = stp_fx.trace(model, x)
    once = stp_fx.prune_graph(gm, "random", 0.25, calibration=[x], compensation="mean")
    twice = stp_fx.prune_graph(once, "random", 0.5, calibration=[x], compensation="mean")
    assert {name for name, _ in twice.named_parameters()} == {*dict(model.named_parameters()), "last.bias", "conv2d_bias"}
    torch.testing.assert_close(twice(x).mean((0, 2, 3)), model(x).mean((0, 2, 3)))
    # the plan speaks of the network that it was made for
    plan = stp_fx.plan_of(twice)
    assert stp_fx.plan_of(stp_fx.apply_plan(gm, plan)) == plan


def test_errors() -> None:
    setting = Setting("lines")
    with pytest.raises(InputError, match="unknown compensation 'median'"):
        stp_fx.prune_graph(setting.gm, compensation="median", calibration=setting.batches)
    with pytest.raises(InputError, match="calibration"):
        stp_fx.prune_graph(setting.gm, compensation="mean")
    with pytest.raises(InputError, match="ridge"):
        CompensateLeastSquares(ridge=2.0)
    fresh = stp_fx.trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 4))
    with pytest.raises(PassError, match="plan"):
        CompensateMean()(fresh)
    selected = Pipeline(ScoreUnits(), SelectUnits())(fresh).artifacts
    with pytest.raises(PassError, match="CollectStatistics"):
        CompensateMean()(fresh, selected)
    measured = CollectStatistics([torch.randn(3, 4)])(fresh, selected).artifacts
    with pytest.raises(InputError, match="covariance=True"):
        CompensateLeastSquares()(fresh, measured)
