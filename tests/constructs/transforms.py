"""Fourier transforms, complex numbers, ops of torchvision, writing by number, distances."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from .catalogue import conv, image, integers, maps, network, rows, tokens


class GlobalFilter(nn.Module):
    """GFNet: the spectrum times learnt numbers, a pair of real ones for each complex one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6, 4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft2(x, dim=(2, 3), norm="ortho") * torch.view_as_complex(self.weight)
        return torch.fft.irfft2(spectrum, s=x.shape[2:], dim=(2, 3), norm="ortho")


class Operator(nn.Module):
    """A Fourier neural operator: low frequencies mixed by complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft2(x)
        low = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :3, :3].to(torch.complex128), self.weight)
        padded = F.pad(torch.view_as_real(low), (0, 0, 0, spectrum.shape[3] - 3, 0, spectrum.shape[2] - 3))
        return torch.fft.irfft2(torch.view_as_complex(padded), s=x.shape[2:]).to(x.dtype)


maps("spectrum times learnt numbers", GlobalFilter, "exact")
maps("low frequencies mixed by complex weights", Operator, "exact")
maps("two transforms, real part", lambda y: torch.fft.fft2(y).real + torch.fft.ifftn(y, dim=(2, 3)).imag, "exact")
maps("transform over channels", lambda y: torch.fft.fft(y, dim=1).abs(), "pinned", "runs over it")
rows("power spectrum over time", lambda y: torch.fft.rfft(y, dim=1).abs().pow(2), "exact")
rows("Hermitian transform", lambda y: torch.fft.hfft(y, dim=1) + torch.fft.ihfft(y, dim=1).real.sum(1, keepdim=True), "exact")


def complex_rotary(y: torch.Tensor) -> torch.Tensor:
    """Positions as angles, of pairs of neighbouring channels."""
    pairs = torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2))
    angles = torch.arange(y.shape[1], dtype=y.dtype)[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=y.dtype)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


rows("rotary positions as complex numbers", complex_rotary, "exact")
rows("conjugate times itself", lambda y: (torch.complex(y, 2 * y).conj() * torch.complex(y, y)).imag, "exact")


@network("deformable convolution", "exact")
class Deformable(nn.Module):
    groups = offset_groups = 1

    def __init__(self) -> None:
        super().__init__()
        taps = 9 * self.offset_groups
        self.a, self.offset, self.mask, self.b = conv(3, 8), conv(8, 2 * taps), conv(8, taps), conv(8, 3)
        self.deformed = torchvision.ops.DeformConv2d(8, 8, 3, padding=1, groups=self.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.a(x))
        return self.b(torch.tanh(self.deformed(y, self.offset(y), torch.sigmoid(self.mask(y)))))


@network("deformable convolution in groups", "exact")
class DeformableGroups(Deformable):
    groups = 2


@network("deformable convolution, offsets by groups of channels", "pinned", reason="offsets of their own")
class DeformableOffsets(Deformable):
    offset_groups = 2


@network("deformable convolution as a function", "exact", axis="weight:0")
class DeformableFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.offset, self.b = conv(3, 8), conv(8, 18), conv(6, 3)
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.a(x))
        return self.b(torch.tanh(torchvision.ops.deform_conv2d(y, self.offset(y), self.weight, padding=1)))


def regions(y: torch.Tensor) -> torch.Tensor:
    boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 1.0, 5.0, 5.0]], dtype=y.dtype)
    return torchvision.ops.roi_align(y, boxes, (4, 4), sampling_ratio=2) + torchvision.ops.roi_pool(y, boxes, (4, 4))


maps("pooled regions", regions, "exact")


@network("sums of rows by number", "exact", tokens())
class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.register_buffer("where", torch.tensor([0, 1, 2, 0, 1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.a(x))
        sums = y.new_zeros(x.shape[0], 3, y.shape[2]).index_add(1, self.where, y)
        best = y.new_zeros(x.shape[0], 3, y.shape[2]).index_reduce(1, self.where, y, "amax")
        copied = torch.zeros_like(sums).index_copy(1, torch.tensor([2, 0]), y[:, :2])
        return self.c(torch.tanh(self.b(sums + best + copied)))


@network("channels written by number", "pinned", tokens(), reason="looked up by an index that is data")
class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.a(x))
        where = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
        return self.c(y.new_zeros(x.shape[0], x.shape[1], 9).index_add(2, where, y))


@network("rows of bounded norm", "inexact", integers(), axis="e.weight:1")
class Bounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.b = nn.Embedding(7, 8, max_norm=1.0), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.e(x))


@network("distances to stored centres", "inexact", tokens())
class Radial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(10, 3)
        self.centres = nn.Parameter(torch.randn(10, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.exp(-torch.cdist(self.a(x), self.centres)))


@network("patches weighed by their middle", "exact", image())
class Unfolded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.a(x))
        patches = F.unfold(y, 3, padding=1).reshape(*y.shape[:2], 9, *y.shape[2:])
        return self.b((patches * torch.tanh(patches[:, :, 4:5])).sum(2))
