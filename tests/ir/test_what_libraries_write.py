"""Code as libraries of networks write it, which the fx front end takes: each of these was refused once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


def sizes_in_an_array(net: Convs, y: Tensor) -> Tensor:
    sizes = np.array(y.shape[2:])
    if (sizes % np.power(2, 3)).any():
        raise ValueError(f"not divisible: {sizes}")
    return y * float(np.array(y.shape[1]) + np.asarray([y.shape[2], 1], dtype=np.float32).sum())


def as_tensors(net: Convs, y: Tensor) -> Tensor:
    sizes = torch.as_tensor([y.shape[2], 2], dtype=y.dtype)
    return torch.as_tensor(torch.as_tensor(y), dtype=torch.float64).to(y.dtype) + sizes.prod()


BODIES = {f.__name__: f for f in (asked_by_jit, numbers_on_its_device, sizes_in_an_array, as_tensors)}


@pytest.mark.parametrize("name", BODIES)
def test_what_libraries_write(name: str) -> None:
    """Pruned by half, checked in full, and right for another batch."""
    model = Convs(BODIES[name]).eval()
    gm = stp_fx.trace(model, X, frontend="fx")
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    validation = provenance_of(pruned).validation
    assert validation is not None
    assert {"eval", "train", "masked = removed"} <= set(validation.ran), validation
    torch.testing.assert_close(gm(OTHER), model(OTHER))
    assert pruned.get_parameter("a.weight").shape[0] == 4
    assert pruned(OTHER).shape == model(OTHER).shape


SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda y: torch.reshape(y, [y.shape[0], y.shape[1], *(n // 1 for n in y.shape[2:])]),
    "broadcast_to": lambda y: torch.broadcast_to(y[:, :1], [y.shape[0], 8, *y.shape[2:]]) + y,
    "roll": lambda y: torch.roll(y, (y.shape[2] // 2, y.shape[3] // 2), (2, 3)),
    "roll of one": lambda y: torch.roll(y, y.shape[2] // 2, 2),
    "narrow": lambda y: torch.narrow(y, 2, y.shape[2] // 2, 2),
    "select": lambda y: torch.select(y, 2, y.shape[2] - 1),
    "topk": lambda y: torch.topk(y, y.shape[2] // 2, 2)[0],
    "pool": lambda y: F.avg_pool2d(y, [y.shape[2], y.shape[3]], stride=[y.shape[2], 1]),
    "fft": lambda y: torch.fft.irfft2(torch.fft.rfft2(y), s=(y.shape[2], y.shape[3])),
    "normal": lambda y: y + 0 * torch.normal(0, 1, size=(y.shape[0], 1, 1, 1)),
}


def windows(y: Tensor) -> Tensor:
    """Windows beside the batch, and back; as einops does it, whoever has counted them is checked."""
    b, c, h, w = y.shape
    parts = y.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
    count = (h // 4) * (w // 4)
    if isinstance(parts.shape[0], int) and parts.shape[0] % count != 0:
        raise ValueError(f"cannot divide {parts.shape[0]} windows by {count}")
    again = parts.reshape(parts.shape[0] // count, h // 4, w // 4, c, 4, 4)
    return again.permute(0, 3, 1, 4, 2, 5).reshape(parts.shape[0] // count, c, h, w)


@pytest.mark.parametrize("size", [8, 16])
def test_windows_beside_the_batch_leave_it_free(size: int) -> None:
    model, other = Sized(windows), torch.randn(3, 3, size, size)
    gm = stp_fx.trace(model, torch.randn(2, 3, size, size), frontend="fx")
    assert provenance_of(gm).notes == ()
    torch.testing.assert_close(gm(other), model(other))


class Sized(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.body = nn.Conv2d(3, 8, 3, padding=1), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.a(x))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_in_calls_of_torch_stay_sizes(name: str) -> None:
    """Its parser asks them for whole numbers, which once bound the graph to the example's."""
    model, other = Sized(SIZES[name]), torch.randn(5, 3, 12, 16)
    gm = stp_fx.trace(model, X, frontend="fx")
    assert not any(node.target is torch._assert for node in gm.graph.nodes)
    assert provenance_of(gm).notes == ()
    torch.testing.assert_close(gm(other), model(other))


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "range": lambda y: y * len([torch.roll(y, y.shape[2], 2) for _ in range(y.shape[2])]),
    "slice": lambda y: y + sum([1.0, 2.0, 3.0, 4.0][: y.shape[3] - 6]),
    "at the end": lambda y: y if sum(range(y.shape[3])) == 28 else y * 2,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_sizes_that_became_numbers_bind_the_graph(name: str) -> None:
    gm = stp_fx.trace(Sized(NUMBERS[name]), X, frontend="fx")
    with pytest.raises(AssertionError, match="traced for another shape"):
        gm(torch.randn(2, 3, 12, 12))
