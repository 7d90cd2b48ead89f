"""The second front end: same groups as the first, both modes, free sizes, the original's names and output classes."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import stp_fx
from stp_fx.errors import InputError, TraceError

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    features: torch.Tensor


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.6 registers it by a function that it deprecates
    torch.export.register_dataclass(Answer)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(n, t, c))


class Net(nn.Module):
    """A convolution with BatchNorm, attention, a gated MLP, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16)
        self.attention, self.drop = Attention(16, 4), nn.Dropout(0.5)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x))).flatten(2).transpose(1, 2)
        x = x + self.attention(x)
        x = x + self.down(self.drop(F.silu(self.gate(x)) * self.up(x)))
        return self.head(x.mean(1))


class Several(Net):
    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, flag: bool = True) -> Answer:  # type: ignore[override]
        with torch.no_grad():
            shift = torch.arange(16, device=x.device).float().cos()
        y = F.relu(self.norm(self.stem(x))) + shift[:, None, None]
        y = y if scale is None or not flag else y * scale
        return Answer(self.head(y.mean((2, 3))), y)


class Branching(nn.Module):
    """Control flow over a size that the trace settles."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] == 16:
            x = x * 2
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


def network(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return model


@pytest.mark.parametrize("training", [False, True])
def test_both_front_ends_find_the_same_groups(training: bool) -> None:
    model = network().train(training)
    found = []
    for frontend in ("fx", "export"):
        graph = stp_fx.analyze(stp_fx.trace(model, X, frontend=frontend))
        found.append({(g.size, frozenset((m.axis.name, len(m.index)) for m in g.members)) for g in graph.groups})
    assert found[0] == found[1]


def test_outputs_modes_names_and_sizes() -> None:
    model = network()
    gm = stp_fx.trace(model, X, frontend="export")
    other = torch.randn(5, 3, 16, 16)
    assert torch.equal(gm(other), model(other))
    assert set(gm.state_dict()) == set(model.state_dict())
    assert all(p is model.get_parameter(name) for name, p in gm.named_parameters())
    assert gm.train() is gm
    torch.manual_seed(1)
    expected, state = copy.deepcopy(model).train()(other), copy.deepcopy(gm.state_dict())
    torch.manual_seed(1)
    assert torch.allclose(gm(other), expected)
    assert not torch.equal(gm(other), gm(other))  # dropout is on
    assert not torch.equal(gm.state_dict()["norm.running_mean"], state["norm.running_mean"])
    gm.load_state_dict(state)
    assert torch.equal(gm.eval()(other), gm(other))
    assert torch.equal(pickle.loads(pickle.dumps(gm))(other), gm(other))


def test_masked_is_removed() -> None:
    gm = stp_fx.trace(network().double(), X.double(), frontend="export")
    pruned = stp_fx.prune_graph(gm, ratio=0.5, ignore=[m for g in stp_fx.analyze(gm).groups if not g.exact for m in [g.name]])
    masked = stp_fx.apply_plan(gm, stp_fx.plan_of(pruned), mask=True)
    other = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(pruned(other), masked(other), rtol=0, atol=1e-12)
    assert stp_fx.cost(pruned).macs < 0.6 * stp_fx.cost(gm).macs
    pruned.train()(other).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_dataclasses_come_back_and_constants_are_baked() -> None:
    model = network(Several)
    arguments = {"scale": torch.full((16, 1, 1), 2.0), "flag": True}
    gm = stp_fx.trace(model, X, kwargs=arguments, frontend="export")
    found, expected = gm(X, scale=arguments["scale"]), model(X, **arguments)
    assert isinstance(found, Answer)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.features, expected.features)
    pruned = stp_fx.prune_graph(gm, ratio=0.5, ignore=[]) if stp_fx.analyze(gm).groups else gm
    assert pruned(X, scale=arguments["scale"]).features.shape == expected.features.shape


def test_a_size_that_the_model_has_settled_is_asserted() -> None:
    gm = stp_fx.trace(network(Branching), X, frontend="export")
    assert gm(torch.randn(3, 3, 16, 16)).shape == (3, 2)
    with pytest.raises(AssertionError, match="size 16 in dimension 3"):
        gm(torch.randn(2, 3, 16, 20))
    assert gm(torch.randn(1, 3, 16, 16)).shape == (1, 2)
    one = stp_fx.trace(network(Branching), X[:1], frontend="export")
    with pytest.raises(AssertionError, match="size 1 in dimension 0"):
        one(X)


class AloneOtherwise(Branching):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.shape[0] > 1 else x.flip(0) * 3)


def test_a_batch_of_one_is_taken_where_it_is_computed_alike() -> None:
    for kind in (Net, Several):
        model = network(kind)
        gm = stp_fx.trace(model, X, frontend="export")
        for mode in (False, True):
            found, expected = gm.train(mode)(X[:1]), model.train(mode)(X[:1])
            assert found is not expected
            if not mode:
                assert all(torch.equal(a, b) for a, b in zip(*map(pytree.tree_leaves, (found, expected)), strict=True))
        with pytest.raises(AssertionError, match="at least size 1 in dimension 0"):
            gm(X[:0])
    other = stp_fx.trace(network(AloneOtherwise), X, frontend="export")
    with pytest.raises(AssertionError, match="at least size 2 in dimension 0"):
        other(X[:1])


class Chooses(Branching):
    """Calls whose ATen form sorts its arguments in another way than the method of the same name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        flags = y > 0
        return self.head(torch.where(flags, y, y.exp() - 1).mean((2, 3))) + torch.where(flags, flags, ~flags).sum()


def test_arguments_keep_their_order() -> None:
    model = network(Chooses)
    gm = stp_fx.trace(model, X, frontend="export")
    assert torch.equal(gm(X), model(X))


class OverTheBatch(Branching):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 3 if x.shape[0] > 2 and x.shape[2] % 4 == 0 else x)


def test_branches_over_free_sizes_are_guarded() -> None:
    model = network(OverTheBatch)
    gm = stp_fx.trace(model, torch.randn(5, 3, 16, 16), frontend="export")
    other = torch.randn(7, 3, 20, 16)
    assert torch.equal(gm(other), model(other))
    for shape in ((2, 3, 16, 16), (5, 3, 18, 16)):
        with pytest.raises(AssertionError, match="holds only while"):
            gm(torch.randn(shape))


def test_the_device_follows_the_input() -> None:
    gm = stp_fx.trace(network(Several), X, frontend="export")
    assert "cpu" not in gm.code
    assert gm.to("meta")(X.to("meta")).logits.device.type == "meta"


def test_auto_falls_back() -> None:
    class Counting(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table = {size: k for k, size in enumerate(range(64))}
            return super().forward(x * (1.0 + len([t for t in torch.zeros(2, 3) if t.sum() >= 0 or table]) * 0))

    assert stp_fx.prune_graph(network(Counting), example_inputs=X)(X).shape == (2, 5)


def test_what_neither_captures_says_both() -> None:
    class Data(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(TraceError, match=r"fx: .*export: ") as error:
        stp_fx.trace(network(Data), X)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="known: auto, fx, export"):
        stp_fx.trace(network(), X, frontend="dynamo")
