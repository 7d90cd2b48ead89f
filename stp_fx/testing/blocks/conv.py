"""Convolutions: plain, grouped, depthwise, transposed; shared, tied and derived weights."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.testing.recipe import Block, Pick, Shape, block

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CALLS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED_CALLS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@block("conv")
class Conv(Block):
    layouts = ("map",)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {
            "out": pick.width(),
            "kernel": pick.of(1, 3),
            "bias": pick.flag(),
            "padding": pick.of("zeros", "zeros", "circular"),
        }

    def __init__(self, at: Shape, out: int, kernel: int = 1, bias: bool = True, padding: str = "zeros") -> None:
        super().__init__(at)
        self.conv = CONVS[at.rank - 1](at.channels, out, kernel, padding=kernel // 2, bias=bias, padding_mode=padding)  # pyright: ignore[reportArgumentType]
        self.shape = at.to(channels=out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@block("strided")
class Strided(Block):
    layouts, resizes = ("map",), True

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return min(at.size) >= 4

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"out": pick.width(), "bias": pick.flag()}

    def __init__(self, at: Shape, out: int, bias: bool) -> None:
        super().__init__(at)
        self.conv = CONVS[at.rank - 1](at.channels, out, 3, stride=2, padding=1, bias=bias)
        self.shape = at.to(channels=out, size=tuple((s + 1) // 2 for s in at.size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@block("grouped")
class Grouped(Block):
    layouts = ("map",)

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 2

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        groups = pick.divisor(at.channels)
        return {
            "groups": groups,
            "out": groups * pick.number(1, max(1, 12 // groups)),
            "kernel": pick.of(1, 3),
            "bias": pick.flag(),
        }

    def __init__(self, at: Shape, groups: int, out: int, kernel: int, bias: bool) -> None:
        super().__init__(at)
        self.conv = CONVS[at.rank - 1](at.channels, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.shape = at.to(channels=out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@block("depthwise")
class Depthwise(Block):
    """One filter a channel, or ``multiplier`` of them."""

    layouts = ("map",)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"multiplier": pick.of(1, 2, 3) if at.channels <= 6 else 1, "dilation": pick.of(1, 2), "bias": pick.flag()}

    def __init__(self, at: Shape, multiplier: int, dilation: int, bias: bool) -> None:
        super().__init__(at)
        channels = at.channels
        self.conv = CONVS[at.rank - 1](
            channels, channels * multiplier, 3, padding=dilation, dilation=dilation, groups=channels, bias=bias
        )
        self.shape = at.to(channels=channels * multiplier)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@block("transposed")
class Transposed(Block):
    """Plain, grouped (``groups`` < channels) or depthwise (``groups`` = channels), with or without upsampling."""

    layouts = ("map",)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        groups = pick.of(1, 1, pick.divisor(at.channels), at.channels)
        return {
            "groups": groups,
            "out": groups * pick.number(1, max(1, 12 // groups)),
            "kernel": pick.of(1, 3),
            "bias": pick.flag(),
        }

    def __init__(self, at: Shape, groups: int, out: int, kernel: int, bias: bool) -> None:
        super().__init__(at)
        self.conv = TRANSPOSED[at.rank - 1](at.channels, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.shape = at.to(channels=out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@block("upsampling")
class Upsampling(Block):
    """A transposed convolution of stride 2."""

    layouts, resizes = ("map",), True

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return max(at.size) <= 4

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"out": pick.width()}

    def __init__(self, at: Shape, out: int) -> None:
        super().__init__(at)
        self.conv = TRANSPOSED[at.rank - 1](at.channels, out, 2, stride=2)
        self.shape = at.to(channels=out, size=tuple(2 * s for s in at.size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@block("shared_conv")
class SharedConv(Block):
    """One convolution called twice, with something in between."""

    layouts = ("map",)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"kernel": pick.of(1, 3)}

    def __init__(self, at: Shape, kernel: int) -> None:
        super().__init__(at)
        self.conv = CONVS[at.rank - 1](at.channels, at.channels, kernel, padding=kernel // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.sigmoid(self.conv(x)))


@block("einsum_conv")
class EinsumConv(Block):
    """A 1x1 convolution written as an einsum."""

    layouts = ("map",)
    columns = MappingProxyType({"weight": 1})

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"out": pick.width(), "ellipsis": pick.flag()}

    def __init__(self, at: Shape, out: int, ellipsis: bool) -> None:
        super().__init__(at)
        self.weight = nn.Parameter(torch.randn(out, at.channels) / at.channels**0.5)
        letters = "hwd"[: at.rank]
        self.equation = "nc...,oc->no..." if ellipsis else f"nc{letters},oc->no{letters}"
        self.shape = at.to(channels=out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.equation, x, self.weight)


@block("derived_conv")
class DerivedConv(Block):
    """A weight that is computed before use: standardised, normalised by its filters' norms, scaled, or a piece of a larger one.

    ``standardised`` averages over the input channels; ``normalised`` is a norm over them: both leave out what is absent.
    """

    layouts = ("map",)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"how": pick.of("scaled", "sliced", "normalised", "standardised", "flipped"), "out": pick.number(2, 8)}

    def __init__(self, at: Shape, how: str, out: int) -> None:
        super().__init__(at)
        self.how, self.out = how, out
        rows = out + 3 if how == "sliced" else out
        self.weight = nn.Parameter(torch.randn(rows, at.channels, *[3] * at.rank) / (3**at.rank * at.channels) ** 0.5)
        self.gain = nn.Parameter(torch.randn(out, *[1] * (at.rank + 1)).abs() + 0.5)
        self.bias = nn.Parameter(torch.zeros(out))
        self.columns = {"weight": 1}
        self.columns_suffice = how in ("scaled", "sliced", "normalised", "flipped")
        self.shape = at.to(channels=out)

    def derived(self) -> torch.Tensor:
        weight, others = self.weight, tuple(range(1, self.at.rank + 2))
        if self.how == "sliced":
            return weight[: self.out] * self.gain
        if self.how == "normalised":
            return self.gain * weight / torch.linalg.vector_norm(weight, dim=others, keepdim=True)
        if self.how == "standardised":
            centred = weight - weight.mean(dim=others, keepdim=True)
            return self.gain * centred / (centred.pow(2).mean(dim=others, keepdim=True) + 1e-5).sqrt()
        if self.how == "flipped":
            return weight.flip(0) * self.gain
        return weight * self.gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return CALLS[self.at.rank - 1](x, self.derived(), self.bias, padding=1)


@block("tied_conv")
class TiedConv(Block):
    """A convolution and its transpose with one weight, as in a tied autoencoder."""

    layouts = ("map",)
    columns = MappingProxyType({"weight": 1})
    columns_suffice = False  # the weight's rows are the inputs of its second use

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"inner": pick.width(), "kernel": pick.of(1, 3)}

    def __init__(self, at: Shape, inner: int, kernel: int) -> None:
        super().__init__(at)
        self.pad = kernel // 2
        self.weight = nn.Parameter(torch.randn(inner, at.channels, *[kernel] * at.rank) / (kernel**at.rank * at.channels) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(CALLS[self.at.rank - 1](x, self.weight, self.bias, padding=self.pad))
        return TRANSPOSED_CALLS[self.at.rank - 1](y, self.weight, padding=self.pad)
