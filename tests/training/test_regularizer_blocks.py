"""Sums over weights in blocks, beside the same formulas on whole tensors, which autograd differentiates."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch

from stp_fx.training.regularizers import blocks, gmp
from stp_fx.training.regularizers.blocks import Factor, square_sums


def plain(weight: torch.Tensor, dims: tuple[int, ...], keep: torch.Tensor) -> list[torch.Tensor]:
    squares = (weight.double() * keep) ** 2
    return [squares.sum([k for k in range(weight.dim()) if k != dim]) if weight.dim() > 1 else squares for dim in dims]


def gradient(sums: Iterable[torch.Tensor], weight: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
    """Of the sum of the norms."""
    total = torch.stack([each.sqrt().sum() for each in sums]).sum()
    return torch.autograd.grad(total, weight, create_graph=create_graph)[0]


@pytest.mark.parametrize("size", [1, 5, 64, 1 << 16])
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), (1, 3, 0)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_sums_and_their_gradients(
    size: int, dims: tuple[int, ...], memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", size)
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 2, dtype=torch.float64).contiguous(memory_format=memory).requires_grad_()
    along, across = torch.tensor([1.0, 0, 1, 1, 0, 1]).double(), torch.tensor([1.0, 1, 0, 1]).double()
    keep = Factor(weight, torch.mul, {1: across, 0: along})
    whole = along.reshape(-1, 1, 1, 1) * across.reshape(-1, 1, 1)
    for factor, zeros in ((None, torch.ones_like(whole)), (keep, whole)):
        found, expected = square_sums(weight, dims, torch.float64, factor), plain(weight, dims, zeros)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        reference = gradient(expected, weight, create_graph=True)
        twice = gradient(found, weight, create_graph=True)
        for ours in (twice, gradient(square_sums(weight, dims, torch.float64, factor), weight)):
            torch.testing.assert_close(ours.nan_to_num(), reference.nan_to_num())
        if factor is None:  # a row of zeros has no second derivative
            torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), weight)[0] for each in (twice, reference)))


@pytest.mark.parametrize("shape", [(7,), (0, 3), (5, 2)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float16)
    (found,) = square_sums(weight, (0,), torch.float32)
    torch.testing.assert_close(found, weight.float().square().reshape(shape[0], math.prod(shape[1:])).sum(1))
    assert found.dtype == torch.float32


def test_the_smallest_entries_with_ties() -> None:
    size = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.5]])
    order = {0: [], 1: [5], 2: [1, 5], 3: [1, 3, 5], 4: [1, 3, 4, 5], 5: [1, 2, 3, 4, 5], 6: [0, 1, 2, 3, 4, 5]}
    for count, expected in order.items():
        assert gmp._first(size, count).flatten().nonzero().flatten().tolist() == expected
