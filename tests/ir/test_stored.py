"""A captured graph stores what its model stores, under the same names: state dicts fit both ways."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stp_fx
from stp_fx.ir import provenance_of

FRONT_ENDS = ["fx", "export"]


class NormAct(nn.BatchNorm2d):
    """A batch norm that is traced through, as timm's ``BatchNormAct2d`` is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps
        )
        return x.relu()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unread", torch.arange(8.0))
        self.register_buffer("volatile", torch.arange(8.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), NormAct(8)
        self.block, self.last = Block(), nn.Conv2d(8, 5, 1)
        self.register_buffer("scale", torch.rand(8), persistent=False)
        self.register_buffer("unread", torch.rand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)) * self.scale.view(-1, 1, 1)
        return self.last(self.block(x) + torch.arange(8.0).view(-1, 1, 1))


class Tied(nn.Module):
    """Ties a weight between functions, a buffer between modules, and a module between two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8, bias=False), nn.Module()
        self.second.weight = self.first.weight
        self.norm = NormAct(8)
        self.again = self.norm
        self.act = nn.PReLU(8)
        self.more = nn.ModuleDict({"act": self.act})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.first.weight)
        y = self.act(self.norm(y[:, :, None, None])[:, :, 0, 0])
        return F.linear(y, self.second.weight.t())


def example(net: nn.Module) -> torch.Tensor:
    return torch.randn(4, 4) if isinstance(net, Tied) else torch.randn(4, 3, 6, 6)


@pytest.mark.parametrize("kind", [Net, Tied])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frontend", FRONT_ENDS)
def test_the_same_tensors_under_the_same_names(kind: type[nn.Module], training: bool, frontend: str) -> None:
    net = kind().train(training)
    gm = stp_fx.trace(net, example(net), frontend=frontend)
    mine, theirs = gm.state_dict(keep_vars=True), net.state_dict(keep_vars=True)
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is tensor for name, tensor in theirs.items())
    buffers = dict(gm.named_buffers(remove_duplicate=False))
    unread = {"block.volatile"}  # no state dict holds it either
    assert all(buffers[name] is buffer for name, buffer in net.named_buffers(remove_duplicate=False) if name not in unread)
    for again in (gm, copy.deepcopy(gm)):
        again.load_state_dict(net.state_dict())
        kind().load_state_dict(again.state_dict())
    assert copy.deepcopy(gm).state_dict().keys() == theirs.keys()


@pytest.mark.parametrize("kind", [Net, Tied])
@pytest.mark.parametrize("traced_in", [True, False])
@pytest.mark.parametrize("frontend", FRONT_ENDS)
def test_batches_are_counted_in_training_only(kind: type[nn.Module], traced_in: bool, frontend: str) -> None:
    net = kind().train(traced_in)
    x = example(net)
    gm = copy.deepcopy(stp_fx.trace(net, x, frontend=frontend))
    reference = copy.deepcopy(net)
    assert int(net.norm.num_batches_tracked) == 0
    pruned = [stp_fx.prune_graph(gm, ratio=0.3)] if stp_fx.analyze(gm).groups else []
    assert pruned or frontend == "export"
    for each in (gm, *pruned, torch.load(io.BytesIO(saved(gm)), weights_only=False)):
        for training in (True, False, True):
            each.train(training), reference.train(training)
            each(x), reference(x)
        assert int(each.get_buffer("norm.num_batches_tracked")) == 2
    gm.graph.eliminate_dead_code()
    gm.recompile()
    gm.train()(x)
    assert int(gm.get_buffer("norm.num_batches_tracked")) == 3


def saved(gm: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    return buffer.getvalue()


def test_running_statistics_follow_the_model() -> None:
    net = Net().train()
    gm, x = copy.deepcopy(stp_fx.trace(net, example(net))), example(net)
    for _ in range(3):
        assert torch.allclose(gm(x), net(x), atol=1e-6)
    mine = gm.state_dict()
    assert all(torch.allclose(mine[name], tensor) for name, tensor in net.state_dict().items())


def test_unread_buffers_are_no_groups() -> None:
    gm = stp_fx.trace(Net().eval(), torch.randn(4, 3, 6, 6))
    names = {member.axis.tensor for group in stp_fx.analyze(gm).groups for member in group.members}
    assert "conv.weight" in names
    assert not any("unread" in name or "volatile" in name or "num_batches" in name for name in names)
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    assert pruned.get_buffer("block.unread").shape == (8,)
    assert pruned.get_parameter("conv.weight").shape[0] == 4


class Averaging(NormAct):
    """Averages over all batches, as ``nn.BatchNorm2d(momentum=None)`` does: it reads a number out of a buffer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked)
        else:
            factor = 0.0
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, factor, self.eps
        ).relu()


def test_a_mean_over_all_batches_is_noted() -> None:
    net = Net().eval()
    net.norm = Averaging(8, momentum=None).eval()
    gm = stp_fx.trace(net, torch.randn(4, 3, 6, 6), frontend="fx")
    assert any("momentum=None" in note for note in provenance_of(gm).notes)


def test_parameters_that_nothing_reads_stay_out() -> None:
    net = Net().eval()
    net.block.token = nn.Parameter(torch.zeros(8))
    gm = stp_fx.trace(net, torch.randn(4, 3, 6, 6))
    assert "block.token" not in gm.state_dict()
    assert any("block.token" in note for note in provenance_of(gm).notes)
