"""Models that do something else in training than in evaluation, held against the model itself in both modes."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
import torchvision
from torch import nn

import stp_fx
from stp_fx.ir import modes, provenance_of
from stp_fx.passes import CollectStatistics, UnmaskChannels
from stp_fx.training.adopt import keep_forward


class Net(nn.Module):
    """Two convolutions, a head; subclasses do something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def head(self, x: torch.Tensor) -> Any:
        return self.out(x.mean((2, 3)))

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(F.relu(self.b(self.between(F.relu(self.norm(self.a(x)))))))


class AuxiliaryHead(Net):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.norm(self.a(x)))
        if self.training:
            aux = self.aux(x.mean((2, 3)))
        y = self.out(F.dropout(F.relu(self.b(x)).mean((2, 3)), 0.3, self.training))
        return (y, aux) if self.training else y


class Noise(Net):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class OtherSizes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv2d(8, 8, 1)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.extra(x) if self.training else F.avg_pool2d(x, 2)


class Losses(Net):
    def head(self, x: torch.Tensor) -> Any:
        y = super().head(x)
        return {"loss": y.logsumexp(1).mean(), "logits": y} if self.training else [y.softmax(1), y.argmax(1)]


class RunningMean(Net):
    """What training writes, evaluation reads; the trunk is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
            x = x + 1
            x.mul_(1.5)
        return x - self.mean[None, :, None, None]


class Paths(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            y = F.relu(block(x))
            if self.training:
                y = y * (torch.rand(y.shape[0], 1, 1, 1, dtype=y.dtype) < 0.8).to(y.dtype) / 0.8
            x = x + y
        return x


class Constants(Net):
    """Tensors of the code's own that differ by mode."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        shift = torch.tensor([1.0, 2.0] * 4) if self.training else torch.tensor([3.0, 5.0] * 4)
        return x * shift.to(x.dtype)[:, None, None]


class Probability(Net):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.4 if self.training else 0.0, training=True)


class Frozen(Net):
    """A ``train`` of its own, and literals that are no modes."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, training=False)


class Literal(Net):
    """Its batch norm is frozen by a literal, beside a dropout that asks for the mode."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False)
        return F.dropout(x, 0.5, self.training)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(F.relu(self.b(self.between(self.a(x)))))


class AsksAChild(Net):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) if self.norm.training else x


class SharedReader(Net):
    """Two read one tensor, the first of them in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.norm(self.a(x)))
        if self.training:
            aux = self.aux(x).mean((2, 3))
        y = self.head(F.relu(self.b(x)))
        return (y, aux) if self.training else y


class EitherReader(Net):
    """Each mode has a reader of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if self.training else self.two(x)


class OtherDimension(Net):
    """The same calls in both modes, with other whole numbers."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.sum(2 if self.training else 3, keepdim=True)


class OtherRank(Net):
    """A bool that decides on shapes."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        level = x.amax((2, 3), keepdim=self.training)
        return x * (level if self.training else level[:, :, None, None])


class OtherScale(Net):
    """A float that decides on shapes."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2.0 if self.training else 1.0)


class OtherWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.randn(8, 8, 3, 3))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.one if self.training else self.two, padding=1)


class Counting(Net):
    """A buffer that is written by an augmented assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps.add_(1)
        return x * (1 + 0.1 * self.steps)


class Features(Net):
    def forward(self, x: torch.Tensor) -> Any:
        features = F.relu(self.norm(self.a(x)))
        y = self.head(F.relu(self.b(features)))
        return {"y": y, "features": features} if self.training else {"y": y}


def doubles(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2 if module.training else output


class Hooked(Net):
    """Hooks that ask for the mode, of a part and of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(doubles)
        self.register_forward_hook(doubles)


KINDS = [
    SharedReader,
    EitherReader,
    OtherDimension,
    OtherRank,
    OtherScale,
    OtherWeights,
    Counting,
    Features,
    Hooked,
    AuxiliaryHead,
    Noise,
    OtherSizes,
    Losses,
    RunningMean,
    Paths,
    Constants,
    Probability,
    Frozen,
    Literal,
    AsksAChild,
]
X = torch.randn(4, 3, 8, 8, dtype=torch.float64)
every_kind = pytest.mark.parametrize("kind", KINDS)
from_both = pytest.mark.parametrize("traced_in", [False, True])


Ran = tuple[list[torch.Tensor], dict[str, torch.Tensor]]


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def ran(module: nn.Module, training: bool) -> Ran:
    """Outputs, and the buffers afterwards; gradients of parameters if it trains. The module's own state is put back."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.train(training).zero_grad()
    torch.manual_seed(7)
    outputs = pytree.tree_leaves(module(X.clone()))
    found = {name: tensor.clone() for name, tensor in module.named_buffers()}
    if training:
        sum(y.sum() for y in outputs if y.requires_grad).backward()
        found |= {f"{name} gradient": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.load_state_dict(before)
    return outputs, found


def assert_same(one: nn.Module, other: nn.Module, training: bool) -> None:
    assert_ran(ran(one, training), other, training)


def assert_ran(expectation: Ran, module: nn.Module, training: bool) -> None:
    """That ``module`` gives what another one has given."""
    (expected, theirs), (actual, ours) = expectation, ran(module, training)
    assert len(expected) == len(actual)
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, b)
    for name in theirs.keys() & ours.keys():
        torch.testing.assert_close(theirs[name], ours[name])
    assert {name for name in theirs if "gradient" in name} == {name for name in ours if "gradient" in name}


@every_kind
@from_both
@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_a_graph_does_what_the_model_does_in_both_modes(kind: type[nn.Module], traced_in: bool, frontend: str) -> None:
    model = made(kind).train(traced_in)
    gm = stp_fx.trace(model, X, frontend=frontend)
    assert gm.training is traced_in
    assert not provenance_of(gm).notes
    assert not provenance_of(gm).validation.differs
    graphs = (gm, pickle.loads(pickle.dumps(gm)), copy.deepcopy(gm), copy.copy(gm))
    for training in (True, False):
        expected = ran(model, training)
        for graph in graphs:
            assert_ran(expected, graph, training)
            flags = {name: module.training for name, module in model.named_modules()}
            assert all(module.training == flags.get(name, training) for name, module in graph.named_modules())


@every_kind
@from_both
def test_removal_holds_in_both_modes(kind: type[nn.Module], traced_in: bool) -> None:
    gm = stp_fx.trace(made(kind).train(traced_in), X)
    pruned = stp_fx.prune_graph(gm, ratio=0.5, validate=True)
    assert not provenance_of(pruned).validation.differs
    assert sum(p.numel() for p in pruned.parameters()) < 0.7 * sum(p.numel() for p in gm.parameters())
    masked = stp_fx.apply_plan(gm, stp_fx.plan_of(pruned), mask=True)
    for training in (True, False):
        assert_same(gm, UnmaskChannels()(masked).graph_module, training)
    assert_same_outputs(masked.eval(), pruned.eval())
    shapes = [[t.shape for t in ran(graph, True)[0]] for graph in (masked, pruned)]
    assert shapes[0] == shapes[1]


def assert_same_outputs(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(pytree.tree_leaves(one(X)), pytree.tree_leaves(other(X)), strict=True):
        torch.testing.assert_close(a, b)


@every_kind
def test_files_and_classes_know_both_modes(kind: type[nn.Module], tmp_path: Path) -> None:
    pruned = stp_fx.prune_graph(made(kind), ratio=0.5, example_inputs=X)
    stp_fx.save(pruned, tmp_path / "net.stp")
    others = [stp_fx.load(tmp_path / "net.stp", made(kind))]
    if kind is not Constants:  # its class has a list of eight numbers in its code
        others.append(stp_fx.write_back(pruned, made(kind)))
    for again in others:
        for training in (True, False):
            assert_same(pruned, again, training)


@every_kind
def test_measuring_runs_evaluation_alone(kind: type[nn.Module]) -> None:
    gm = stp_fx.trace(made(kind), X)
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    CollectStatistics([X])(gm)
    stp_fx.prune_graph(gm, "variance", 0.5, calibration=[X], compensation="least_squares", recalibrate=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in gm.state_dict().items())


def test_aware_training_keeps_both_modes() -> None:
    gm = stp_fx.trace(made(AuxiliaryHead).train(), X)
    optimizer = torch.optim.SGD(gm.parameters(), 1e-2)
    pat = stp_fx.PATPassManager(gm, criterion="magnitude", ratio=0.5, steps=3, regularizer="group_lasso", optimizer=optimizer)
    for epoch in range(4):
        pat.prune(epoch)
        loss = sum(y.square().mean() for y in pat.model(X)) + pat.loss()
        loss.backward()
        pat.regularize()
        optimizer.step()
        optimizer.zero_grad()
    assert pat.model.get_parameter("a.weight").shape[0] == 4
    assert len(pat.model.train()(X)) == 2
    assert isinstance(pat.model.eval()(X), torch.Tensor)


def test_costs_are_those_of_evaluation() -> None:
    x = torch.randn(1, 3, 64, 64)
    with_heads, without = (
        stp_fx.trace(torchvision.models.googlenet(init_weights=False, aux_logits=aux).eval(), x, validate=False)
        for aux in (True, False)
    )
    assert stp_fx.cost(with_heads).macs == stp_fx.cost(without).macs


def test_a_train_that_does_more_is_not_called_on_the_model() -> None:
    class Merging(Net):
        """Adds its low-rank part to the weights in evaluation, as LoRA does."""

        def __init__(self) -> None:
            super().__init__()
            self.low, self.merged = nn.Parameter(torch.randn(8, 3, 3, 3)), False

        def train(self, mode: bool = True) -> Merging:
            super().train(mode)
            if mode == self.merged:
                self.a.weight.data += -self.low.data if mode else self.low.data
                self.merged = not mode
            return self

        def forward(self, x: torch.Tensor) -> Any:
            a = F.conv2d(x, self.a.weight if self.merged else self.a.weight + self.low, self.a.bias, padding=1)
            return self.head(F.relu(self.b(F.dropout(a, 0.5, self.training))))

    model = made(Merging)
    before = copy.deepcopy(model.state_dict())
    gm = stp_fx.trace(model, X)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.merged
    torch.testing.assert_close(made(Merging).eval()(X), gm.eval()(X))


@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.empty(1).uniform_())])
def test_drawn_once_is_no_training_graph(draw: Callable[[], float]) -> None:
    class LayerDrop(Net):
        def between(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.training and draw() < 0.5 else x + self.b(x)

    gm = stp_fx.trace(made(LayerDrop).eval(), X)
    assert any("captured in eval mode alone" in note for note in provenance_of(gm).notes)
    assert not modes.has_modes(gm.graph)
    gm = stp_fx.trace(made(LayerDrop).train(), X, frontend="fx", validate=False)
    assert any("draws random numbers" in note for note in provenance_of(gm).notes)


def test_a_batch_of_one_is_taken_where_modes_differ() -> None:
    model = made(Noise).eval()
    gm = stp_fx.trace(model, X, frontend="export")
    torch.testing.assert_close(gm(X[:1]), model(X[:1]))


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_assignments_are_noted(frontend: str) -> None:
    class Remembering(Net):
        def __init__(self) -> None:
            super().__init__()
            self.last: torch.Tensor | None = None

        def between(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x
            return x

    notes = provenance_of(stp_fx.trace(made(Remembering), X, frontend=frontend)).notes
    assert any("assigns to last" in note for note in notes)


def test_what_cannot_be_captured_in_training_is_said() -> None:
    class Branching(Net):
        def between(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if self.training and x.sum() > 0 else x

    gm = stp_fx.trace(made(Branching).eval(), X)
    assert any("captured in eval mode alone" in note for note in provenance_of(gm).notes)


def test_a_network_that_does_not_ask_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("joined")

    monkeypatch.setattr("stp_fx.ir.fx_frontend.joined", refuse)
    stp_fx.trace(torchvision.models.resnet18(), torch.randn(2, 3, 64, 64), validate=False)
    stp_fx.trace(torchvision.models.vit_b_16(image_size=32), torch.randn(2, 3, 32, 32), validate=False)


def test_compiled_graphs_follow_the_mode() -> None:
    for _ in range(10):  # more than torch.compile's limit of recompilations of one function
        gm = stp_fx.trace(made(OtherSizes), X, validate=False)
        compiled = torch.compile(gm, backend="eager", fullgraph=True)
        for training in (True, False):
            gm.train(training)
            torch.testing.assert_close(compiled(X), gm(X))


@pytest.mark.parametrize("view", ["computational", "dependency", "combined"])
def test_pictures_show_no_marks(view: str, tmp_path: Path) -> None:
    path = stp_fx.analyze(stp_fx.trace(made(AuxiliaryHead), X)).draw(tmp_path / "net.dot", view)
    assert not any(name in path.read_text() for name in modes.MARKS)


def test_a_forward_that_is_held_follows_the_graph() -> None:
    """Accelerate wraps `forward` once; after a rewrite the function that it holds runs the new graph, in either mode."""
    gm: Any = stp_fx.trace(AuxiliaryHead(), torch.randn(2, 3, 8, 8))
    keep_forward(gm)
    held, x = type(gm).forward, torch.randn(2, 3, 8, 8)
    for node in list(gm.graph.nodes):
        if node.target == "out":
            with gm.graph.inserting_after(node):
                nothing = gm.graph.call_function(torch.mul, (node, 0.0))
            node.replace_all_uses_with(nothing, delete_user_cb=lambda user, made=nothing: user is not made)
    gm.recompile()
    assert type(gm).forward is held
    for mode in (True, False):
        found = held(gm.train(mode), x)
        assert bool((pytree.tree_leaves(found)[0] == 0).all())
