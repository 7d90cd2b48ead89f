"""ReconstructBlockwise and Distill: which blocks there are, what training gives beside solutions in closed form, what is kept."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prenorm import PreNorm
from repair_networks import NETWORKS, error, made, planned
from torch import nn

import stp_fx
from stp_fx.analysis import build
from stp_fx.errors import InputError, PassError
from stp_fx.passes import Distill, MaskChannels, Pipeline, ReconstructBlockwise, ReconstructSequentially, RemoveChannels
from stp_fx.rewrite import side_by_side
from stp_fx.rewrite.blocks import find_blocks, trained_calls, values_of
from stp_fx.rewrite.blockwise import match
from stp_fx.rewrite.side_by_side import Network
from stp_fx.rewrite.training import Training
from stp_fx.testing.untouched import assert_untouched, snapshot

PASSES = (ReconstructBlockwise, Distill)


def blocks_of(model: nn.Module, *inputs: torch.Tensor) -> list[tuple[list[str], tuple[str, ...]]]:
    """Of each block, its layers and its targets."""
    gm = stp_fx.trace(model.eval(), inputs)
    network = Network(gm, lambda _: True)
    layers = [call.node for call in trained_calls(gm)[0] if call.contracts]
    found = find_blocks(network, values_of(network, inputs), network.by_name, layers)
    return [([each for each in layers if block.holds(network, each)], block.targets) for block in found]


class Encoder(nn.Module):
    """A transformer's layer behind an embedding, with a mask that all layers read."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.embed, self.norm_first = nn.Embedding(9, 12), norm_first
        self.position = nn.Embedding(5, 12)
        self.qkv, self.project = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.norms, self.head = nn.ModuleList(nn.LayerNorm(12) for _ in range(3)), nn.Linear(12, 4)

    def attend(self, x, mask):
        q, k, v = (each.unflatten(-1, (2, 6)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return self.project(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))

    def forward(self, ids, mask):
        bias = (1.0 - mask.float())[:, None, None] * -1e4
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        if self.norm_first:
            x = x + self.attend(self.norms[0](x), bias)
            x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        else:
            x = self.norms[0](x + self.attend(x, bias))
            x = self.norms[1](x + self.down(F.gelu(self.up(x))))
        return self.head(self.norms[2](x).mean(1)).argmax(-1)


class Shortcut(nn.Module):
    """A residual block with a convolution in its shortcut, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b, self.short = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, 1, 1), nn.Conv2d(8, 12, 1, 2)
        self.c, self.d, self.head = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.short(x) + self.b(F.relu(self.a(x))))
        x = F.relu(x + self.d(F.relu(self.c(x))))
        return self.head(x.mean((2, 3)))


class Skips(nn.Module):
    """A U-Net of one level, and a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.up = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 2, 2), nn.ConvTranspose2d(8, 6, 2, 2)
        self.last, self.side = nn.Conv2d(12, 4, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        y = F.relu(self.down(x))
        return {"map": self.last(torch.cat([x, F.relu(self.up(y))], 1)), "side": self.side(y.mean((2, 3)))}


IDS, MASK = torch.arange(10).view(2, 5) % 9, torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
FOUND: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...], list[tuple[list[str], tuple[str, ...]]]]] = {
    "a chain: each convolution with its norm and activation": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(),
                              nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2), nn.Softmax(1)),
        (torch.randn(2, 3, 8, 8),),
        [(["_0"], ("_2",)), (["_3"], ("_6",)), (["_7"], ("_8",))],
    ),
    "residual blocks": (
        Shortcut,
        (torch.randn(2, 3, 8, 8),),
        [(["stem"], ("relu",)), (["a", "b", "short"], ("relu_2",)), (["c", "d"], ("mean",)), (["head"], ("head",))],
    ),
    "halves of a transformer's layer, norms first": (
        Encoder,
        (IDS, MASK),
        [(["qkv", "project"], ("add_1",)), (["up", "down"], ("mean",)), (["head"], ("head",))],
    ),
    "halves of a transformer's layer, norms last": (
        lambda: Encoder(norm_first=False),
        (IDS, MASK),
        [(["qkv", "project"], ("norms_0",)), (["up", "down"], ("mean",)), (["head"], ("head",))],
    ),
    "a skip and two outputs: one block from where they part": (
        Skips,
        (torch.randn(2, 3, 8, 8),),
        [(["first"], ("relu",)), (["down", "up", "last", "side"], ("last", "side"))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_blocks_are_found(name):
    make, inputs, expected = FOUND[name]
    found = [(sorted(layers), targets) for layers, targets in blocks_of(make(), *inputs)]
    assert found == [(sorted(layers), targets) for layers, targets in expected]


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_masked_is_removed_after_the_repair(name, method):
    model, x = made(name, 1)
    x = x[:16]
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    repair = method([x[:8], x[8:]], steps=6, start=None, plan=plan)
    repaired = repair(gm).graph_module
    assert any(not torch.equal(a, b) for a, b in zip(gm.parameters(), repaired.parameters(), strict=True))
    masked = Pipeline(MaskChannels(plan))(repaired).graph_module
    removed = Pipeline(RemoveChannels(plan))(repaired).graph_module
    assert torch.allclose(masked(x), removed(x), rtol=1e-9, atol=1e-9)


def test_scales_of_rms_norms_over_fewer_channels_are_trained_as_masked():
    """Removal multiplies them by a number, which the repair has to know."""
    model = next(each for each in map(PreNorm, range(100)) if each.kind == "rms" and not each.images)
    x = model.example(16)
    gm = stp_fx.trace(model, x)
    group = next(g for g in stp_fx.analyze(gm).groups if any(m.axis.name == "norm.weight:0" for m in g.members))
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, ratio=0.0, ratios={group.name.partition(":")[0]: 0.4}))
    assert ("norm.weight", 0) in plan.kept
    for method in PASSES:
        repaired = method([x[:8], x[8:]], steps=6, start=None, plan=plan)(gm).graph_module
        assert not torch.equal(repaired.get_parameter("norm.weight"), gm.get_parameter("norm.weight"))
        masked, removed = (stp_fx.apply_plan(repaired, plan, mask=each) for each in (True, False))
        assert torch.allclose(masked(x), removed(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("name", ["linear", "tokens", "depthwise", "norms", "residual"])
def test_the_output_comes_nearer_to_the_original(name, method):
    model, x = made(name)
    new, x = torch.randn_like(x), x[:256] if x.dim() < 3 else x[:32]
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    repaired = method(x.chunk(4), steps=24, start=None, plan=plan)(gm).graph_module
    assert error(model, stp_fx.apply_plan(repaired, plan), new) < 0.8 * error(model, stp_fx.apply_plan(gm, plan), new)


def test_the_whole_is_trained_on_from_the_sequential_repair():
    model, x = made("linear")
    gm, new = stp_fx.trace(model, x), torch.randn_like(x)
    plan, parts = planned(gm), x.chunk(4)
    sequential = Pipeline(ReconstructSequentially(parts, plan=plan))(gm).graph_module
    refused, trained = (Distill(parts, steps=24, rate=rate, plan=plan)(gm).graph_module for rate in (1e3, 0.01))
    for (name, a), (_, b) in zip(refused.state_dict().items(), sequential.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    before = error(model, stp_fx.apply_plan(sequential, plan), new)
    assert error(model, stp_fx.apply_plan(trained, plan), new) < 0.9 * before


@pytest.mark.parametrize("method", PASSES)
def test_a_repair_before_it_is_as_good_as_its_own_start(method):
    """If it is told what the original network is; else it would train towards the repaired one."""
    model, x = made("residual")
    gm, parts = stp_fx.trace(model, x), x[:32].chunk(4)
    plan = planned(gm)
    own = method(parts, steps=8, plan=plan)(gm).graph_module
    before = ReconstructSequentially(parts, plan=plan)(gm).graph_module
    after, astray = (method(parts, steps=8, start=None, plan=plan, original=each)(before).graph_module for each in (gm, None))
    for (name, a), (_, b) in zip(own.state_dict().items(), after.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(after.parameters(), astray.parameters(), strict=True))


@pytest.mark.parametrize("method", [*PASSES, ReconstructSequentially])
def test_another_original_is_refused(method):
    model, x = made("linear")
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    others = {
        "the smaller network": (stp_fx.apply_plan(gm, plan), r"the network that was given.*differ in .*weight"),
        "other calls": (stp_fx.trace(made("tokens")[0], made("tokens")[1]), "the network that was given"),
        "a module": (model, "GraphModule, as `trace` gives it"),
    }
    before = snapshot(gm)
    for name, (other, said) in others.items():
        repair = method(x.chunk(4), plan=plan, original=other)
        with pytest.raises(InputError, match=said):
            pytest.fail(f"{name} was taken: {repair(gm)}")
    assert_untouched(before)


def test_a_linear_block_comes_to_the_solution_of_least_squares():
    """Of what the network as repaired so far gives it, towards what it gave in the original."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(1024, 6, dtype=torch.float64)
    gm = stp_fx.trace(model, x)
    plan = build.analyze(gm).plan_for({"0": list(range(6))})
    done = match(gm, plan, [x[:896], x[896:]], Training(300, 0.03), start=None)
    assert done.layers == ("_2", "_4")
    small = stp_fx.apply_plan(done.graph_module, plan)
    for name in ("0.weight", "0.bias"):
        assert torch.equal(done.graph_module.get_parameter(name), gm.get_parameter(name))
    with torch.no_grad():
        inner = torch.tanh(F.linear(torch.tanh(F.linear(x, small.get_parameter("0.weight"), small.get_parameter("0.bias"))),
                                    small.get_parameter("2.weight"), small.get_parameter("2.bias")))  # fmt: skip
        read = torch.cat([inner, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        least = (read @ torch.linalg.lstsq(read[:896], model(x)[:896]).solution - model(x))[:896].square().mean()
        assert float((small(x) - model(x))[:896].square().mean()) < 1.1 * float(least)
        assert float((stp_fx.apply_plan(gm, plan)(x) - model(x))[:896].square().mean()) > 2 * float(least)


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("parts", [1, 3])
def test_training_that_does_harm_on_what_is_held_out_is_not_kept(method, parts):
    model, x = made("linear")
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    result = method(x.chunk(parts), steps=8, rate=1e3, start=None, plan=plan)(gm).graph_module
    for (name, a), (_, b) in zip(result.state_dict().items(), gm.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", PASSES)
def test_what_is_held_out_is_not_trained_on(method):
    """The last of three batches is. What it lacks is not learned from it."""
    model, x = made("linear")
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    one, other = (
        method([x[:100], x[100:200], held], steps=1, rate=1e-3, start=None, plan=plan)(gm).graph_module.state_dict()
        for held in (x[200:], x[200:] * 1.01)
    )
    assert all(torch.allclose(one[name], other[name], rtol=1e-6, atol=1e-9) for name in one)


@pytest.mark.parametrize("method", PASSES)
def test_the_same_every_time_and_no_generator_is_touched(method, monkeypatch):
    model, x = made("residual")
    parts = x[:16].chunk(4)
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    written = []
    save = torch.save
    monkeypatch.setattr(side_by_side.torch, "save", lambda *args, **kw: (written.append(args[1]), save(*args, **kw)))

    def repaired(**options: Any) -> dict[str, torch.Tensor]:
        return method(parts, steps=4, start=None, plan=plan, **options)(gm).graph_module.state_dict()

    torch.manual_seed(3)
    state = torch.get_rng_state()
    once = repaired()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    for again in (repaired(), repaired(memory=0)):
        assert all(torch.equal(once[name], again[name]) for name in once)
    assert written
    assert any(not torch.equal(once[name], value) for name, value in repaired(seed=7).items())


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(method, mode):
    model, x = made("norms")
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    expected = method([x], steps=4, plan=plan)(gm).graph_module.state_dict()
    with mode():
        found = method([x.clone()], steps=4, plan=plan)(gm).graph_module
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected[name]), name
    stp_fx.apply_plan(found, plan)(x).sum().backward()


@pytest.mark.parametrize("method", PASSES)
def test_flags_modes_and_buffers_are_as_they_were(method):
    model, x = made("norms")
    model[1].eval()
    model[2].train()
    model[0][0].weight.requires_grad_(False)
    model(x).sum().backward()
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    before = snapshot(model, gm, x)
    result = method([x], steps=6, start=None, plan=plan)(gm).graph_module
    assert_untouched(before)
    assert [m.training for m in result.modules()] == [m.training for m in gm.modules()]
    for (name, a), b in zip(gm.named_parameters(), result.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad, name
    assert all(torch.equal(a, b) for a, b in zip(gm.buffers(), result.buffers(), strict=True))
    assert not torch.equal(gm.get_parameter("2.0.weight"), result.get_parameter("2.0.weight"))


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method, dtype):
    model, x = made("linear")
    model, x = model.to(dtype), x.to(dtype)
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    repaired = method(x.chunk(4), steps=40, start=None, plan=plan)(gm).graph_module
    assert {p.dtype for p in repaired.parameters()} == {dtype}
    assert error(model, stp_fx.apply_plan(repaired, plan), x) < 0.8 * error(model, stp_fx.apply_plan(gm, plan), x)


def test_weights_that_two_blocks_read_or_the_graph_computes_stay_and_are_named(caplog):
    torch.manual_seed(0)
    shared, computed = nn.Linear(8, 8), torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), computed, nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(64, 4)
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    with caplog.at_level(logging.INFO, logger="stp_fx"):
        result = ReconstructBlockwise([x], steps=5, start=None, plan=plan)(gm).graph_module
    assert torch.equal(result.get_parameter("2.weight"), shared.weight)
    assert "_2 is not repaired (blockwise): its weight is read outside of its block as well" in caplog.text
    assert "its weight is computed from others" in caplog.text
    whole = Distill([x], steps=5, start=None, plan=plan)(gm).graph_module
    assert not torch.equal(whole.get_parameter("2.weight"), shared.weight)


class Forward(torch.autograd.Function):
    """A function whose gradient nobody has written."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("no backward")


class Ends(nn.Module):
    def __init__(self, end: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.end = nn.Linear(4, 12), nn.Linear(12, 3), end

    def forward(self, x):
        return self.end(self.second(self.first(x).relu()))


@pytest.mark.parametrize(
    ("end", "words"),
    [(lambda y: y.detach(), "no gradient reaches"), (lambda y: Forward.apply(y), "gradient cannot be computed: no backward")],
)
def test_blocks_without_a_gradient_stay_and_are_named(end, words):
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    gm = stp_fx.trace(Ends(end), x)
    plan = planned(gm)
    done = match(gm, plan, [x], Training(4, 0.01), start=None)
    assert done.graph_module is gm
    assert words in done.left_alone["second"]


class Writes(nn.Module):
    """A block that begins with writing into what it is given."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.second, self.last, self.in_place = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3), in_place

    def forward(self, x):
        x = x.mul_(2).relu_() if self.in_place else (x * 2).relu()
        x = self.first(x)
        x = x + self.second(x)
        x = x.mul_(3) if self.in_place else x * 3
        return self.last(x)


@pytest.mark.parametrize("method", PASSES)
def test_writing_in_place_changes_nothing(method):
    torch.manual_seed(0)
    x = torch.randn(64, 4, dtype=torch.float64)
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        gm = stp_fx.trace(Writes(in_place).double(), x.clone())
        given = [x[:32].clone(), x[32:].clone()]
        found.append(method(given, steps=6, start=None, plan=planned(gm))(gm).graph_module.state_dict())
        assert torch.equal(torch.cat(given), x)
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-9) for name in found[0])


class Routed(nn.Module):
    """Each token goes to the expert that the router likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(6, 24), nn.Linear(24, 2), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(24, 8) for _ in range(2))

    def forward(self, x):
        x = self.embed(x).relu()
        chosen, out = self.router(x).argmax(-1), x.new_zeros(x.shape[0], 8)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]))
        return self.head(out)


def test_blocks_whose_tokens_go_other_ways_stay_and_are_named():
    torch.manual_seed(0)
    x = torch.randn(100, 6)
    gm = stp_fx.trace(Routed(), x)
    done = match(gm, build.analyze(gm).plan_for({"embed": list(range(20))}), [x], Training(4, 0.01), start=None)
    assert not done.layers
    assert "routed by data" in done.left_alone["head"]


def test_an_empty_batch_among_others_changes_nothing():
    model, x = made("strided")
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    some, more = (
        ReconstructBlockwise(data, steps=4, start=None, plan=plan)(gm).graph_module.state_dict()
        for data in ([x[:8], x[8:]], [x[:0], x[:8], x[8:]])
    )
    assert all(torch.equal(some[name], more[name]) for name in some)


@pytest.mark.parametrize("name", ["blockwise", "distillation"])
def test_what_a_user_calls(name, monkeypatch):
    for each in PASSES:
        monkeypatch.setattr(each, "__init__", lambda *args, init=each.__init__, **kw: init(*args, **{"steps": 5, **kw}))
    model, x = made("norms")
    pruned = stp_fx.prune_graph(model, "variance", 0.5, example_inputs=x, calibration=iter([x, x + 0.1]), compensation=name)
    report = stp_fx.report_of(pruned)
    assert report is not None
    assert report.compensation == name
    assert {group.compensation for group in report.groups} == {name}
    gm = stp_fx.trace(copy.deepcopy(model), x)
    pat = stp_fx.PATPassManager(gm, criterion="variance", ratio=0.5, steps=2, compensation=name, train_loader=[x, x + 0.1])
    for epoch in range(2):  # masks, then removes
        pat.prune(epoch)
        assert gm(x).shape == model(x).shape
    assert gm.get_parameter("0.0.weight").shape[0] == 6


def test_an_empty_plan_changes_nothing():
    model, x = made("linear")
    gm = stp_fx.trace(model, x)
    for method in PASSES:
        assert method([x], plan=stp_fx.plan_of(gm))(gm).graph_module is gm


@pytest.mark.parametrize("method", PASSES)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"steps": 0}, "steps"), ({"rate": 0.0}, "rate"), ({"rate": float("nan")}, "rate"), ({"start": "mean"}, "start"),
     ({"seed": -1}, "seed"), ({"memory": -1}, "memory")],
)  # fmt: skip
def test_bad_arguments(method, arguments, words):
    with pytest.raises(InputError, match=words):
        method([torch.zeros(1)], **arguments)


@pytest.mark.parametrize("method", PASSES)
def test_bad_data_is_named(method):
    model, x = made("linear")
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    with pytest.raises(PassError, match="plan"):
        method([x])(gm)
    with pytest.raises(InputError, match="no batch"):
        method([], start=None, plan=plan)(gm)
    with pytest.raises(InputError, match="not finite"):
        method([x, x * float("nan")], start=None, plan=plan)(gm)
    with pytest.raises(InputError, match="two rows"):
        method([x[:1]], start=None, plan=plan)(gm)


def test_a_pipeline_is_read_back():
    text = "Pipeline(ReconstructBlockwise(steps=50, start=None), Distill(rate=0.02))"
    assert str(Pipeline.parse(text, calibration=[torch.zeros(2, 2)])) == text
