"""ReconstructSequentially: what it repairs, against the original eager network, and what it leaves alone."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from repair_networks import NETWORKS, error, made, planned
from torch import nn

import stp_fx
from stp_fx.analysis import build
from stp_fx.errors import InputError, PassError
from stp_fx.passes import (
    CollectStatistics,
    CompensateLeastSquares,
    MaskChannels,
    Pipeline,
    ReconstructSequentially,
    RemoveChannels,
)
from stp_fx.rewrite import sequential, side_by_side
from stp_fx.rewrite.sequential import reconstruct


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_is_as_near_to_the_original_as_by_least_squares_or_nearer(name):
    model, x = made(name)
    gm = stp_fx.trace(model, x)
    plan, new = planned(gm), torch.randn_like(x)
    by_squares = Pipeline(
        CollectStatistics([x], covariance=True, maps=True, patches=400), CompensateLeastSquares(plan), RemoveChannels(plan)
    )
    repaired = Pipeline(ReconstructSequentially([x], plan=plan), RemoveChannels(plan))(gm).graph_module
    assert error(model, repaired, new) <= 1.05 * error(model, by_squares(gm).graph_module, new)
    assert error(model, repaired, new) < 0.8 * error(model, stp_fx.apply_plan(gm, plan), new)
    assert dict(repaired.named_parameters()).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_is_removed_after_the_repair(name):
    model, x = made(name, 1)
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    repair = ReconstructSequentially([x], plan=plan)
    masked = Pipeline(repair, MaskChannels(plan))(gm).graph_module
    removed = Pipeline(repair, RemoveChannels(plan))(gm).graph_module
    assert torch.allclose(masked(x), removed(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "strided", "transposed", "one dimension", "three dimensions"])
def test_channels_that_others_determine_are_removed_for_free(name):
    """The removed channels of the first layer are sums of kept ones, and there is no nonlinearity in between."""
    model, x = made(name)
    model[1] = nn.Identity()
    gm = stp_fx.trace(model, x)
    count = model[0].weight.shape[0]
    gone = [1, count - 1]
    with torch.no_grad():
        for index in gone:
            model[0].weight[index] = model[0].weight[0] + 0.5 * model[0].weight[2]
            model[0].bias[index] = model[0].bias[0] + 0.5 * model[0].bias[2]  # at the border, too
    plan = build.analyze(gm).plan_for({"0": gone})
    repaired = reconstruct(gm, plan, [x] * 2).graph_module
    assert error(model, stp_fx.apply_plan(repaired, plan), x) < 1e-6 * float(model(x).detach().var())


def test_a_layer_behind_the_damage_is_refitted_although_it_loses_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 10), nn.Linear(10, 4)).double()
    x = torch.randn(512, 6, dtype=torch.float64)
    gm = stp_fx.trace(model, x)
    plan = build.analyze(gm).plan_for({"0": list(range(20))})
    done = reconstruct(gm, plan, [x])
    assert done.layers == ("_2", "_3")


def test_layers_before_the_damage_keep_their_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(256, 6)
    gm = stp_fx.trace(model, x)
    done = reconstruct(gm, build.analyze(gm).plan_for({"2": [0, 3, 5]}), [x])
    assert done.layers == ("_4",)
    for name in ("0.weight", "2.weight"):
        assert torch.equal(done.graph_module.get_parameter(name), gm.get_parameter(name))


def test_what_a_sum_lacks_is_the_target():
    """The stream is the output, so that nothing after the sums can make up for it."""
    model, x = made("residual")
    model.forward = lambda x: _stream(model, x)
    gm = stp_fx.trace(model, x)
    plan = planned(gm, 0.5)
    with_sums = stp_fx.apply_plan(reconstruct(gm, plan, [x]).graph_module, plan)
    without = stp_fx.apply_plan(reconstruct(gm, plan, [x], residuals=False).graph_module, plan)
    assert error(model, with_sums, x) < 0.97 * error(model, without, x)


def _stream(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = model.stem(x)
    for block, scale in zip(model.blocks, model.scale, strict=True):
        x = x + block(x) * scale
    return x


class Attention(nn.Module):
    """Three heads of eight dimensions."""

    def __init__(self, fused: bool, product: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 72) if fused else nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.project = nn.Linear(24, 24)
        self.fused, self.product = fused, product

    def forward(self, x):
        b, n, _ = x.shape
        parts = self.qkv(x).chunk(3, -1) if self.fused else [layer(x) for layer in self.qkv]
        q, k, v = (part.view(b, n, 3, 8).transpose(1, 2) for part in parts)
        if self.product == "matmul":
            y = torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.project(y.transpose(1, 2).reshape(b, n, 24))


@pytest.mark.parametrize("product", ["matmul", "fused kernel"])
@pytest.mark.parametrize("fused", [True, False])
def test_lost_head_dimensions_are_folded_into_the_scores(fused, product, monkeypatch):
    torch.manual_seed(0)
    model = Attention(fused, product).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "qkv" in name and weight.dim() == 2:
                weight *= 3  # scores that matter
    x, new = torch.randn(128, 6, 24, dtype=torch.float64), torch.randn(64, 6, 24, dtype=torch.float64)
    gm = stp_fx.trace(model, x)
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, "magnitude", 0.25, products="inner"))
    folded = stp_fx.apply_plan(reconstruct(gm, plan, [x]).graph_module, plan)
    monkeypatch.setattr(sequential, "find_folds", lambda *_: {})
    plain = stp_fx.apply_plan(reconstruct(gm, plan, [x]).graph_module, plan)
    assert error(model, folded, new) < 0.9 * error(model, plain, new)


def test_queries_that_are_rotated_by_position_stay_as_they_are():
    class Rotary(Attention):
        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = (part.view(b, n, 3, 8).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            angle = torch.arange(6.0, dtype=x.dtype)[:, None] * 0.5 ** torch.arange(4)
            q, k = (torch.cat([t[..., :4] * angle.cos() - t[..., 4:] * angle.sin(),
                               t[..., 4:] * angle.cos() + t[..., :4] * angle.sin()], -1) for t in (q, k))  # fmt: skip
            return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 24))

    torch.manual_seed(0)
    model = Rotary(True, "").double()
    x = torch.randn(64, 6, 24, dtype=torch.float64)
    gm = stp_fx.trace(model, x)
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, "magnitude", 0.5, products="inner"))
    repaired = stp_fx.apply_plan(reconstruct(gm, plan, [x]).graph_module, plan)
    assert error(model, repaired, x) < error(model, stp_fx.apply_plan(gm, plan), x)


def test_values_in_files_give_the_same_numbers(monkeypatch):
    model, x = made("residual")
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    written = []
    save = torch.save
    monkeypatch.setattr(side_by_side.torch, "save", lambda *args, **kw: (written.append(args[1]), save(*args, **kw)))
    spilled = reconstruct(gm, plan, [x, x + 1, x - 1], memory=0).graph_module
    held = reconstruct(gm, plan, [x, x + 1, x - 1]).graph_module
    assert written
    assert not any(path.exists() for path in written)
    for (name, a), (_, b) in zip(spilled.state_dict().items(), held.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_weight_that_several_calls_read_stays_and_is_named(caplog):
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(64, 4)
    gm = stp_fx.trace(model, x)
    with caplog.at_level(logging.INFO, logger="stp_fx"):
        result = Pipeline(ReconstructSequentially([x], plan=planned(gm)))(gm).graph_module
    assert torch.equal(result.get_parameter("2.weight"), shared.weight)
    assert "read by several calls" in caplog.text


def test_what_a_user_calls():
    model, x = made("norms")
    report = stp_fx.report_of(
        stp_fx.prune_graph(model, "variance", 0.5, example_inputs=x, calibration=iter([x, x]), compensation="sequential")
    )
    assert report is not None
    assert report.compensation == "sequential"
    assert {group.compensation for group in report.groups} == {"sequential"}


def test_an_empty_plan_changes_nothing():
    model, x = made("linear")
    gm = stp_fx.trace(model, x)
    assert Pipeline(ReconstructSequentially([x], plan=stp_fx.plan_of(gm)))(gm).graph_module is gm


@pytest.mark.parametrize(("arguments", "words"), [({"memory": -1}, "memory"), ({"residuals": 1}, "residuals")])
def test_bad_arguments(arguments, words):
    with pytest.raises(InputError, match=words):
        ReconstructSequentially([torch.zeros(1)], **arguments)


def test_bad_data_is_named():
    model, x = made("linear")
    gm = stp_fx.trace(model, x)
    with pytest.raises(PassError, match="plan"):
        ReconstructSequentially([x])(gm)
    with pytest.raises(InputError, match="no batch"):
        ReconstructSequentially([], plan=planned(gm))(gm)
    with pytest.raises(InputError, match="not finite"):
        ReconstructSequentially([x, x * float("nan")], plan=planned(gm))(gm)


class Routed(nn.Module):
    """A mixture of experts: each token goes to the expert that the router likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(6, 24), nn.Linear(24, 3)
        self.experts = nn.ModuleList(nn.Linear(24, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x).relu()
        chosen = self.router(x).argmax(-1)
        out = x.new_zeros(x.shape[0], 8)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]))
        return self.head(out)


def test_layers_whose_tokens_go_other_ways_stay_and_are_named():
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(200, 6)
    gm = stp_fx.trace(model, x)
    plan = build.analyze(gm).plan_for({"embed": list(range(20))})
    done = reconstruct(gm, plan, [x])
    assert "router" in done.layers
    assert {"experts_0", "experts_1", "experts_2", "head"} <= done.left_alone.keys()
    assert "routed by data" in done.left_alone["head"]


class Added(nn.Module):
    """Layers as GPT-2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 20)), nn.Parameter(torch.randn(20, 4))
        self.bias, self.last = nn.Parameter(torch.randn(20)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.addmm(self.last, torch.addmm(self.bias, x, self.first).relu(), self.second)


@pytest.mark.parametrize("compensation", ["least_squares", "sequential"])
def test_a_product_with_a_bias_is_repaired(compensation):
    torch.manual_seed(0)
    model, x = Added(), torch.randn(256, 6)
    before = error(model, stp_fx.prune_graph(model, "magnitude", 0.4, example_inputs=x), x)
    after = stp_fx.prune_graph(model, "magnitude", 0.4, example_inputs=x, calibration=[x], compensation=compensation)
    assert error(model, after, x) < 0.6 * before
    assert after.get_parameter("last").shape == (4,)


def test_an_empty_batch_among_others_changes_nothing():
    model, x = made("strided")
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    some, more = (reconstruct(gm, plan, data).graph_module for data in ([x], [x, x[:0]]))
    for (name, a), (_, b) in zip(some.state_dict().items(), more.state_dict().items(), strict=True):
        assert torch.allclose(a, b), name


def test_stored_tensors_that_lie_in_files_are_those_that_have_been_refitted():
    class ReadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(n, m)) for n, m in ((20, 6), (16, 20), (4, 16)))

        def forward(self, x):
            a, b, c = self.a, self.b, self.c
            return F.linear(F.linear(F.linear(x, a).relu(), b).relu(), c)

    torch.manual_seed(0)
    model, x = ReadFirst(), torch.randn(256, 6)
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    held, spilled = (reconstruct(gm, plan, [x[:128], x[128:]], memory=memory).graph_module for memory in (None, 0))
    for (name, one), (_, other) in zip(held.state_dict().items(), spilled.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_queries_that_a_second_product_reads_stay_as_they_are():
    class Twice(Attention):
        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = (part.view(b, n, 3, 8).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            scores = torch.softmax(q @ k.transpose(-2, -1), -1) + torch.softmax(q @ v.transpose(-2, -1), -1)
            return self.project((scores @ v).transpose(1, 2).reshape(b, n, 24))

    torch.manual_seed(0)
    model, x = Twice(True, "").double(), torch.randn(64, 6, 24, dtype=torch.float64)
    gm = stp_fx.trace(model, x)
    plan = stp_fx.plan_of(stp_fx.prune_graph(gm, "magnitude", 0.5, products="inner"))
    run = sequential._Sequence(gm, stp_fx.apply_plan(gm, plan), build.analyze(gm), build.analyze(gm).survivors(plan), True, {})
    assert not run._folds


def test_an_empty_batch_in_a_network_with_sums():
    model, x = made("residual")
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    some, more = (reconstruct(gm, plan, data).graph_module for data in ([x], [x[:0], x]))
    assert torch.allclose(some(x), more(x))


def test_an_image_without_a_batch():
    torch.manual_seed(0)
    model, x = NETWORKS["strided"][0](), torch.randn(3, 20, 20)
    model(x)
    gm = stp_fx.trace(model, x)
    plan = planned(gm)
    done = reconstruct(gm, plan, [x])
    assert error(model, stp_fx.apply_plan(done.graph_module, plan), x) < 0.8 * error(model, stp_fx.apply_plan(gm, plan), x)


def test_a_layer_with_a_hook_stays_and_is_named():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)), torch.randn(64, 6)
    model[2].register_forward_hook(lambda module, inputs, output: output * 2)
    gm = stp_fx.trace(model, x)
    done = reconstruct(gm, planned(gm), [x])
    assert not done.layers
    assert "hooks" in done.left_alone["_2"]
