"""Convolutions, norms, activations and per-channel parameters."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from . import catalogue
from .catalogue import Construct, add, conv, image

network = partial(catalogue.network, columns=True)


class Layers(nn.Module):
    """``a``, a norm or activation, layers under test, ``b``: in 1, 2 or 3 dimensions."""

    def __init__(self, rank: int, *middle: nn.Module, out: int = 8) -> None:
        super().__init__()
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.a, self.middle, self.b, self.c = layer(3, 8, 1), nn.Sequential(*middle), layer(out, 6, 1), layer(6, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.sigmoid(self.b(torch.sigmoid(self.middle(torch.sigmoid(self.a(x)))))))


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layers(name: str, expect: str, make, *, ranks: tuple[int, ...] = (1, 2, 3), reason: str = "", out: int = 8) -> None:
    for rank in ranks:
        add(
            Construct(
                f"{name} in {rank}d",
                lambda rank=rank: Layers(rank, *make(rank), out=out),
                image(*{1: (8,), 2: (6, 6), 3: (4, 4, 4)}[rank]),
                expect,
                reason=reason,
                columns=True,
            )
        )


layers("convolution", "exact", lambda r: [CONVS[r - 1](8, 8, 3, stride=2, padding=1)])
layers("grouped convolution", "exact", lambda r: [CONVS[r - 1](8, 12, 3, padding=1, groups=4)], out=12)
layers("depthwise convolution", "exact", lambda r: [CONVS[r - 1](8, 8, 3, padding=1, groups=8)])
layers("depthwise with multiplier", "exact", lambda r: [CONVS[r - 1](8, 16, 3, padding=2, dilation=2, groups=8)], out=16)
layers("transposed convolution", "exact", lambda r: [TRANSPOSED[r - 1](8, 6, 2, stride=2)], out=6)
layers("grouped transposed convolution", "exact", lambda r: [TRANSPOSED[r - 1](8, 12, 3, padding=1, groups=4)], out=12)
layers("depthwise transposed convolution", "exact", lambda r: [TRANSPOSED[r - 1](8, 16, 2, stride=2, groups=8)], out=16)
layers("batch norm", "exact", lambda r: [(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[r - 1](8)])
layers("instance norm", "exact", lambda r: [(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[r - 1](8, affine=True)])
layers("group norm", "sound", lambda r: [nn.GroupNorm(4, 8)])
layers(
    "padding and pooling",
    "exact",
    lambda r: [
        (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)[r - 1](1),
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[r - 1](2),
    ],
)
layers(
    "batch norm without statistics", "exact", lambda r: [nn.BatchNorm2d(8, affine=False, track_running_stats=False)], ranks=(2,)
)
layers("instance norm with statistics", "exact", lambda r: [nn.InstanceNorm2d(8, track_running_stats=True)], ranks=(2,))
layers("group norm over all", "inexact", lambda r: [nn.GroupNorm(1, 8)], ranks=(2,))
layers("group norm over each", "exact", lambda r: [nn.GroupNorm(8, 8)], ranks=(2,))
layers(
    "group norm, group convolution", "sound", lambda r: [nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1, groups=4)], ranks=(2,)
)
layers("shared prelu", "exact", lambda r: [nn.PReLU()], ranks=(2,))
layers("prelu per channel", "exact", lambda r: [nn.PReLU(8)], ranks=(2,))
layers(
    "activations with offsets",
    "exact",
    lambda r: [nn.Softplus(), nn.Hardswish(), nn.ELU(), nn.LogSigmoid(), nn.Mish()],
    ranks=(2,),
)
layers(
    "dropouts",
    "exact",
    lambda r: [nn.Dropout(0.5), nn.Dropout2d(0.3), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.1)],
    ranks=(2,),
)
layers(
    "convolution with reflected borders", "exact", lambda r: [nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")], ranks=(2,)
)
layers("identity and flatten pair", "exact", lambda r: [nn.Identity(), nn.Flatten(2), nn.Unflatten(2, (6, 6))], ranks=(2,))
layers("upsampling", "exact", lambda r: [nn.Upsample(scale_factor=2), nn.AvgPool2d(2), nn.LPPool2d(2, 2)], ranks=(2,))
layers("pixel shuffle modules", "exact", lambda r: [nn.PixelUnshuffle(2), nn.PixelShuffle(2)], ranks=(2,))


@network("layer norm over channels-last", "inexact")
class LayerNormLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = conv(3, 8), nn.LayerNorm(8), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@network("layer norm as a call", "inexact")
class LayerNormCall(LayerNormLast):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).permute(0, 2, 3, 1)
        y = F.layer_norm(y, (y.shape[-1],), self.norm.weight, self.norm.bias, 1e-6)
        return self.b(y.permute(0, 3, 1, 2))


@network("layer norm over channels and positions", "inexact", image(4, 4))
class LayerNormAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = conv(3, 8), nn.LayerNorm([8, 4, 4]), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)))


@network("layer norm written out over channels first", "inexact")
class LayerNormWritten(LayerNormLast):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        mean = y.mean(1, keepdim=True)
        spread = (y - mean).pow(2).mean(1, keepdim=True)
        y = (y - mean) / torch.sqrt(spread + 1e-6)
        return self.b(self.norm.weight[:, None, None] * y + self.norm.bias[:, None, None])


@network("rms norm", "exact", columns=False)
class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = conv(3, 8), nn.RMSNorm(8), conv(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x).movedim(1, -1)).movedim(-1, 1))


@network("global response norm", "inexact")
class ResponseNorm(nn.Module):
    """ConvNeXt V2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 3)
        self.gamma, self.beta = nn.Parameter(torch.randn(1, 8, 1, 1)), nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        size = y.norm(dim=(2, 3), keepdim=True)
        return self.b(self.gamma * (y * size / (size.mean(1, keepdim=True) + 1e-6)) + self.beta + y)


@network("layer scale", "exact")
class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 8), conv(8, 3)
        self.gamma = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.c(x + self.gamma * self.b(F.gelu(self.a(x))))


@network("residual with a projection", "exact", axis="shortcut.weight:0")
class ProjectedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(3, 4), conv(4, 6), conv(6, 8), conv(8, 3)
        self.shortcut, self.norm = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.c(F.relu_(self.norm(self.shortcut(x)) + self.b(self.a(x).relu())))


@network("a broadcast constant buffer", "exact")
class ConstantBuffer(nn.Module):
    """Per-channel numbers that no norm owns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 3)
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("std", torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b((self.a(x) - self.mean[:, None, None]) / self.std)


@network("a boolean buffer per channel", "exact")
class ChannelMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 3)
        self.register_buffer("mask", (torch.arange(8) % 3 > 0).view(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(torch.where(self.mask, y, y.cos()))


@network("control flow over shapes", "exact")
class ShapeControl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.down = conv(3, 8), conv(8, 8), nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.a(x))
        if y.shape[1] != x.shape[1]:
            x = self.down(x)
        for _ in range(y.dim() - 2):
            y = y + x
        return self.b(y)
