"""Code as libraries of networks write it, which the fx front end takes: each of these was refused once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stp_fx
from stp_fx.ir import provenance_of

X = torch.randn(2, 3, 8, 8)
OTHER = torch.randn(5, 3, 8, 8)
Body = Callable[["Convs", Tensor], Tensor]


class Convs(nn.Module):
    """Two convolutions, and what ``body`` does between them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), body
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.body(self, self.a(x)))


def asked_by_jit(net: Convs, y: Tensor) -> Tensor:
    right = torch.jit.isinstance(y, Tensor) and torch.jit.isinstance([y, y], list[Tensor])
    return y * 2 if right and not torch.jit.isinstance([y], list[int]) else y


def numbers_on_its_device(net: Convs, y: Tensor) -> Tensor:
    """A list of numbers that becomes a tensor beside those that depend on the input."""
    rows = torch.stack(torch.meshgrid(*(torch.arange(n, device=y.device) for n in y.shape[2:]), indexing="ij"))
    places = (rows * torch.tensor([1, 2 * 8 - 1], device=y.device)[:, None, None]).sum(dim=0)
    return y + places.to(y.dtype) / torch.tensor([y.shape[2], 8], dtype=y.dtype, device=y.device).prod()


BODIES = {f.__name__: f for f in (asked_by_jit, numbers_on_its_device)}


@pytest.mark.parametrize("name", BODIES)
def test_what_libraries_write(name: str) -> None:
    """Pruned by half, checked in full, and right for another batch."""
    model = Convs(BODIES[name]).eval()
    gm = stp_fx.trace(model, X, frontend="fx")
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    validation = provenance_of(pruned).validation
    assert {"eval", "train", "masked = removed"} <= set(validation.ran), validation
    torch.testing.assert_close(gm(OTHER), model(OTHER))
    assert pruned.get_parameter("a.weight").shape[0] == 4
    assert pruned(OTHER).shape == model(OTHER).shape
