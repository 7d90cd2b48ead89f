"""A change of basis keeps the function, and what is removed afterwards is what masking masks."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prenorm import PreNorm, WrittenNorm
from torch import fx, nn

import stp_fx
from stp_fx.errors import InputError, NothingToRotateError, WriteBackError
from stp_fx.ir.provenance import provenance_of
from stp_fx.passes import LayerNormToRMSNorm, RotateResidual
from stp_fx.rewrite.basis.streams import find_streams

SEEDS = range(24)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def captured(seed: int) -> tuple[PreNorm, fx.GraphModule]:
    model = PreNorm(seed)
    return model, stp_fx.trace(model, model.example(), validate=False)


def stream_group(gm: fx.GraphModule) -> Any:
    (stream,) = find_streams(gm)
    (group,) = [g for g in stp_fx.analyze(gm).groups if set(g.units.tolist()) == set(stream.units.tolist())]
    return group


@pytest.mark.parametrize("seed", SEEDS)
def test_rotation_keeps_the_function_and_makes_removal_exact(seed: int) -> None:
    model, gm = captured(seed)
    for data in (None, [model.example(8, 1)]):
        rotated = RotateResidual(data)(gm).graph_module
        for rows in (2, 5):
            x = model.example(rows, rows)
            torch.testing.assert_close(rotated(x), model(x), **CLOSE)
    group = stream_group(rotated)
    assert group.exact, group.notes
    graph = stp_fx.analyze(rotated)
    flags = torch.zeros(graph.units, dtype=torch.bool).numpy()
    flags[group.units[-3:]] = True
    plan = graph.plan_removing(flags)
    smaller, masked = stp_fx.apply_plan(rotated, plan), stp_fx.apply_plan(rotated, plan, mask=True)
    torch.testing.assert_close(smaller(x), masked(x), **CLOSE)
    assert (smaller(x) - model(x)).abs().max() > 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_layer_norms_become_rms_norms(seed: int) -> None:
    model, gm = captured(seed)
    outcome = LayerNormToRMSNorm()(gm)
    assert outcome.modified == (model.kind in ("layer", "plain"))
    result = outcome.graph_module
    assert not any(isinstance(module, nn.LayerNorm) for name, module in result.named_modules() if outcome.modified)
    x = model.example(3, 3)
    torch.testing.assert_close(result(x), model(x), **CLOSE)


def test_principal_components_come_first() -> None:
    model, gm = captured(next(seed for seed in SEEDS if PreNorm(seed).kind == "layer"))
    data = [model.example(64, 1)]
    rotated = RotateResidual(data)(gm).graph_module
    (stream,) = find_streams(rotated)
    energy = []
    for norm in stream.norms:
        seen: list[torch.Tensor] = []
        rotated.get_submodule(str(norm.node.target)).register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.detach()))
        rotated(*data)
        energy.append(seen[0].reshape(-1, stream.size).square().mean(0))
    mean = torch.stack(energy).mean(0)
    assert bool((mean[:-1] >= mean[1:] - 1e-12).all())
    assert mean.sum() == pytest.approx(stream.size, rel=1e-3)


def test_a_stream_in_few_dimensions_loses_the_others_for_nothing() -> None:
    class Low(nn.Module):
        """What is written into the stream lies in 3 of 12 dimensions, none of which is a channel."""

        def __init__(self) -> None:
            super().__init__()
            self.into, self.up, self.down = nn.Linear(3, 12, bias=False), nn.Linear(12, 20), nn.Linear(20, 3)
            self.back, self.norm, self.last, self.head = (
                nn.Linear(3, 12, bias=False),
                nn.LayerNorm(12),
                nn.LayerNorm(12),
                nn.Linear(12, 5),
            )
            self.back.weight = self.into.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.into(x)
            x = x + self.back(self.down(F.gelu(self.up(self.norm(x)))))
            return self.head(self.last(x))

    torch.manual_seed(0)
    model, x = Low().double().eval(), torch.randn(16, 3, dtype=torch.float64)
    gm = stp_fx.trace(model, x)
    for options in ({}, {"calibration": [x], "criterion": "variance"}):
        pruned = stp_fx.prune_graph(gm, ratio=0.0, ratios={"into": 0.75}, basis="rotate", **options)
        assert pruned.get_parameter("into.weight").shape == (3, 3)
        torch.testing.assert_close(pruned(x), model(x), **CLOSE)
    plain = stp_fx.prune_graph(gm, ratio=0.0, ratios={"into": 0.75})
    assert (plain(x) - model(x)).abs().max() > 1e-2


def test_single_precision_is_rounded_once() -> None:
    model = PreNorm(3).float()
    x = model.example()
    x = x.float() if x.is_floating_point() else x
    rotated = RotateResidual()(stp_fx.trace(model, x, validate=False)).graph_module
    assert {p.dtype for p in rotated.parameters()} == {torch.float32}
    torch.testing.assert_close(rotated(x), model(x), rtol=1e-4, atol=1e-4)


def test_names_of_parameters_are_kept() -> None:
    _, gm = captured(0)
    rotated = RotateResidual()(gm).graph_module
    before, after = {name for name, _ in gm.named_parameters()}, {name for name, _ in rotated.named_parameters()}
    assert before - after == {name for name in before if "norm" in name and name.endswith("bias")}
    assert after - before == set(provenance_of(rotated).added)


@pytest.mark.parametrize("seed", range(0, 24, 3))
def test_saved_and_loaded(tmp_path: Path, seed: int) -> None:
    model, gm = captured(seed)
    x = model.example(3, 1)
    pruned = stp_fx.prune_graph(gm, ratio=0.3, basis="rotate", validate=False)
    stp_fx.save(pruned, tmp_path / "small.safetensors")
    again = stp_fx.load(tmp_path / "small.safetensors", PreNorm(seed))
    torch.testing.assert_close(again(x), pruned(x), rtol=0, atol=0)
    stp_fx.save(again, tmp_path / "again.safetensors")
    torch.testing.assert_close(stp_fx.load(tmp_path / "again.safetensors", model)(x), pruned(x), rtol=0, atol=0)


def test_a_record_of_another_network_is_refused(tmp_path: Path) -> None:
    _, gm = captured(0)
    stp_fx.save(RotateResidual()(gm).graph_module, tmp_path / "rotated.safetensors")
    with pytest.raises(stp_fx.errors.FileError):
        stp_fx.load(tmp_path / "rotated.safetensors", stp_fx.trace(nn.Linear(3, 4), torch.randn(2, 3)))


def test_copies_exports_and_trains() -> None:
    model, gm = captured(0)
    x = model.example()
    pruned = stp_fx.prune_graph(gm, ratio=0.3, basis="rotate")
    torch.testing.assert_close(copy.deepcopy(pruned)(x), pruned(x), rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.save(pruned, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), pruned(x), rtol=0, atol=0)
    exported = torch.export.export(pruned, (x,)).module()
    torch.testing.assert_close(exported(x), pruned(x), **CLOSE)
    optimizer = torch.optim.SGD(pruned.parameters(), 1e-4)
    pruned.train()(x).square().mean().backward()
    optimizer.zero_grad()
    loss = pruned.eval()(x).square().mean()
    loss.backward()
    optimizer.step()
    assert pruned(x).square().mean() < loss


def test_exported_to_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = PreNorm(1).float()
    x = model.example()
    x = x.float() if x.is_floating_point() else x
    pruned = stp_fx.prune_graph(stp_fx.trace(model, x, validate=False), ratio=0.3, basis="rotate")
    torch.onnx.export(pruned, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), pruned(x).detach(), rtol=1e-3, atol=1e-3)


def test_written_back_where_the_class_has_rms_norms() -> None:
    seed = next(s for s in SEEDS if PreNorm(s).kind == "rms" and PreNorm(s).head.weight is not PreNorm(s).into.weight)
    model, gm = captured(seed)
    if provenance_of(RotateResidual()(gm).graph_module).added:
        pytest.skip("a bias was made, which the class has no place for")
    rotated = RotateResidual()(gm).graph_module
    torch.testing.assert_close(stp_fx.write_back(rotated, model)(model.example()), model(model.example()), **CLOSE)


def test_not_written_back_where_the_class_has_layer_norms() -> None:
    seed = next(s for s in SEEDS if PreNorm(s).kind == "layer")
    model, gm = captured(seed)
    pruned = stp_fx.prune_graph(gm, ratio=0.3, basis="rotate", validate=False)
    with pytest.raises(WriteBackError, match="cannot express a change of basis") as caught:
        stp_fx.write_back(pruned, model)
    assert "norm: a LayerNorm that is an RMSNorm now" in caught.value.constants


# -- refusals ------------------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A stream of 8 channels that ``step`` works on."""

    def __init__(self, step: Any, *, bias: bool = True) -> None:
        super().__init__()
        self.into, self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.norm, self.last, self.batch = nn.LayerNorm(8), nn.LayerNorm(8), nn.BatchNorm1d(5)
        self.conv, self.step = nn.Conv1d(8, 8, 3, padding=1), step
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        self.double().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.step(self, self.into(x))
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(self.last(x))


REFUSED = {
    "post-norm": (lambda net, x: net.norm(x + net.down(F.gelu(net.up(x)))), "stands between the norm"),
    "an activation on the stream": (lambda net, x: F.gelu(x), "as no linear layer or LayerNorm does"),
    "a depthwise convolution": (lambda net, x: net.depthwise(x.transpose(1, 2)).transpose(1, 2), "as no linear layer"),
    "a direct reader of the mean": (
        lambda net, x: x + net.conv(x.transpose(1, 2)).transpose(1, 2), "as no linear layer or LayerNorm does"
    ),
    "a padded convolution reads a norm": (
        lambda net, x: x + net.conv(net.norm(x).transpose(1, 2)).transpose(1, 2), "pads what it reads"
    ),
    "clamped": (lambda net, x: x.clamp(-65504, 65504), "as no linear layer or LayerNorm does"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated_says_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    step, why = REFUSED[name]
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    gm = stp_fx.trace(Around(step), x, validate=False)
    with pytest.raises(NothingToRotateError, match="nothing can be rotated") as caught:
        RotateResidual()(gm)
    assert why in str(caught.value)
    with caplog.at_level(logging.INFO, "stp_fx.basis"):
        assert not LayerNormToRMSNorm()(gm).modified
    assert why in caplog.text


def test_pinned_streams_say_why() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    with pytest.raises(NothingToRotateError, match="graph output"):
        RotateResidual()(stp_fx.trace(model, torch.randn(2, 4)))


def test_an_embedding_that_bounds_the_norm_of_its_rows_is_refused() -> None:
    """The example looks up none of the rows that are too long, so running it would not show the change."""

    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(30, 16, max_norm=3.0), nn.Linear(16, 16), nn.Linear(16, 5)
            self.norm, self.last = nn.LayerNorm(16), nn.LayerNorm(16)
            with torch.no_grad():
                self.embed.weight.mul_(0.3)
                self.embed.weight[29] *= 30

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            return self.head(self.last(x + self.inner(self.norm(x))))

    gm = stp_fx.trace(Bounded().double().eval(), torch.randint(0, 20, (2, 8)))
    with pytest.raises(NothingToRotateError, match="max_norm"):
        RotateResidual()(gm)
    assert not LayerNormToRMSNorm()(gm).modified


def test_a_graph_without_norms_says_so() -> None:
    with pytest.raises(NothingToRotateError, match="no norm over channels"):
        stp_fx.prune_graph(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), example_inputs=torch.randn(2, 4), basis="rotate"
        )


def test_meta_graphs_are_refused() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), torch.randn(2, 4)
    with pytest.raises(NothingToRotateError, match="meta device"):
        RotateResidual()(stp_fx.trace(model, x))


def test_an_unknown_basis_is_refused() -> None:
    with pytest.raises(InputError, match="unknown basis 'spin'"):
        stp_fx.prune_graph(nn.Linear(3, 4), example_inputs=torch.randn(1, 3), basis="spin")  # type: ignore[arg-type]


def test_a_class_token_beside_a_pinned_stream_is_no_reason_to_stop() -> None:
    """Two streams: one ends at the output, the other is rotated."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.na, self.b, self.nb, self.out = (
                nn.Linear(4, 8),
                nn.LayerNorm(8),
                nn.Linear(8, 6),
                nn.LayerNorm(6),
                nn.Linear(6, 2),
            )

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.na(self.a(x))
            return y, self.out(self.nb(self.b(y)))

    model, x = Two().double(), torch.randn(3, 4, dtype=torch.float64)
    rotated = RotateResidual()(stp_fx.trace(model, x)).graph_module
    assert isinstance(rotated.na, nn.LayerNorm)
    assert isinstance(rotated.nb, nn.RMSNorm)
    for found, expected in zip(rotated(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_written_norms_become_calls() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.norm, self.out = nn.Linear(4, 8), WrittenNorm(8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.into(x)
            mean = x.mean(-1, keepdim=True)
            x = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-3).sqrt()
            return self.out(self.norm(x))

    model, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    gm = stp_fx.trace(model, x)
    rotated = RotateResidual()(gm).graph_module
    targets = [node.target for node in rotated.graph.nodes]
    assert targets.count(F.rms_norm) == 2
    torch.testing.assert_close(rotated(x), model(x), **CLOSE)
