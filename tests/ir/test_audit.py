"""Python that a trace could lose or misread: loops over the batch, gradient-free blocks, hooks, wrapped models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.errors import InputError


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


class _LoopOverBatch(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.last(self.first(x[i : i + 1]))[0] for i in range(x.shape[0])])


class _FrozenStem(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.last(torch.relu(self.second(x)))


class _List(_Net):
    def forward(self, xs: list[torch.Tensor]) -> torch.Tensor:
        return super().forward(xs[0] + xs[1])


def test_loop_over_the_batch_is_unrolled_for_the_examples_batch_and_says_so_for_others() -> None:
    net = _LoopOverBatch().eval()
    gm = stp_fx.trace(net, torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(gm(x), net(x))
    with pytest.raises(AssertionError, match="another shape"):
        gm(torch.randn(3, 3, 8, 8))


def test_no_grad_blocks_stay_without_gradients() -> None:
    net = _FrozenStem()
    gm = stp_fx.trace(net, torch.randn(1, 3, 8, 8))
    gm(torch.randn(2, 3, 8, 8)).sum().backward()
    assert net.first.weight.grad is None
    assert net.second.weight.grad is not None


def test_a_trace_under_no_grad_keeps_gradients() -> None:
    with torch.no_grad():
        gm = stp_fx.trace(_Net(), torch.randn(1, 3, 8, 8))
    gm(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in gm.parameters())


def test_a_pre_hook_that_changes_its_input_makes_the_group_inexact() -> None:
    net = _Net()
    net.second.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    groups = {g.name: g for g in stp_fx.analyze(stp_fx.trace(net, torch.randn(1, 3, 8, 8))).groups}
    assert not groups["first.weight:0"].exact
    assert groups["second.weight:0"].exact


def test_a_pre_hook_that_only_looks_does_not() -> None:
    net = _Net()
    net.second.register_forward_pre_hook(lambda module, args: None)
    assert all(g.exact for g in stp_fx.analyze(stp_fx.trace(net, torch.randn(1, 3, 8, 8))).groups)


def test_inputs_in_a_list_follow_the_dtype_of_the_graph() -> None:
    xs = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)]
    gm = copy.deepcopy(stp_fx.trace(_List(), (xs,))).double()
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    assert pruned([x.double() for x in xs]).shape == (1, 4, 4, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_wrapped_and_compiled_models_are_named() -> None:
    with pytest.raises(InputError, match=r"model\.module"):
        stp_fx.trace(nn.DataParallel(_Net()), torch.randn(1, 3, 8, 8))
    with pytest.raises(InputError, match="TorchScript"):
        stp_fx.trace(nn.Sequential(torch.jit.script(_Net())), torch.randn(1, 3, 8, 8))


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.head = nn.Linear(6, 8), nn.Embedding(16, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(16)[None, :].expand(x.shape[0], -1)
        return self.head(self.words(x) + self.positions(positions)[:, : x.shape[1]])


def test_tensors_made_in_the_forward_take_sizes_of_the_input() -> None:
    net = _Positions().eval()
    gm = stp_fx.trace(net, torch.randn(2, 5, 6))
    assert "expand" not in vars(torch.Tensor)
    for shape in ((2, 5, 6), (3, 9, 6)):
        x = torch.randn(shape)
        assert torch.equal(gm(x), net(x))


def test_transformer_is_lowered_and_prunes_exactly() -> None:
    net = nn.Transformer(16, 4, 1, 1, 32, batch_first=True).double().eval()
    source, target = torch.randn(2, 10, 16, dtype=torch.float64), torch.randn(2, 6, 16, dtype=torch.float64)
    gm = stp_fx.trace(net, (source, target))
    assert torch.allclose(gm(source, target), net(source, target), rtol=1e-12)  # lowered, so not bit for bit
    pruned = stp_fx.prune_graph(gm, "random", 0.5)
    masked = stp_fx.apply_plan(gm, stp_fx.plan_of(pruned), mask=True)
    assert torch.allclose(pruned(source, target), masked(source, target), rtol=1e-9, atol=1e-12)
    assert stp_fx.cost(pruned).params < 0.8 * stp_fx.cost(gm).params


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags_lose_columns(mode: str) -> None:
    net = nn.Sequential(nn.EmbeddingBag(20, 8, mode=mode), nn.Linear(8, 3)).double().eval()
    index = torch.randint(0, 20, (4, 5))
    gm = stp_fx.trace(net, index)
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    masked = stp_fx.apply_plan(gm, stp_fx.plan_of(pruned), mask=True)
    assert pruned.get_parameter("0.weight").shape == (20, 4)
    assert torch.allclose(pruned(index), masked(index), rtol=1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weights_computed_by_a_hook_are_copied() -> None:
    net = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(2, 6)
    pruned = stp_fx.prune_graph(net, ratio=0.5, example_inputs=x)
    assert pruned(x).shape == (2, 3)
    assert pruned.get_parameter("2.weight").shape == (3, 4)
