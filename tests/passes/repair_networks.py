"""Small networks that repairs are tried on: linear layers, convolutions of every kind, norms, residual sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import stp_fx


class Called(nn.Module):
    """Convolutions and a linear layer as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(12, 3, 3, 3))
        self.second = nn.Parameter(torch.randn(8, 12, 3, 3))
        self.bias = nn.Parameter(torch.randn(8))
        self.last = nn.Parameter(torch.randn(5, 8))
        self.last_bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        y = F.conv2d(F.conv2d(x, self.first, padding="same").relu(), self.second, self.bias, stride=2, padding=1, dilation=(1, 2))
        return F.linear(y.relu().mean((2, 3)), self.last, self.last_bias)


class Residual(nn.Module):
    """Blocks on a stream, with norms, dropout and a layer scale on the way into the sum."""

    def __init__(self, blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 24, 3, padding=1, bias=False),
                nn.BatchNorm2d(24),
                nn.ReLU(inplace=True),
                nn.Conv2d(24, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.Dropout(0.1),
            )
            for _ in range(blocks)
        )
        self.scale = nn.Parameter(torch.rand(blocks, width, 1, 1) + 0.5)
        self.head = nn.Linear(width, 7)

    def forward(self, x):
        x = self.stem(x)
        for block, scale in zip(self.blocks, self.scale, strict=True):
            x = x + block(x) * scale
        return self.head(x.relu().mean((2, 3)))


def _chain(*layers: nn.Module) -> nn.Module:
    """The layers with activations in between."""
    between = [each for layer in layers for each in (layer, nn.ReLU(inplace=True))]
    return nn.Sequential(*between[:-1])


def _images(second: nn.Module, width: int = 12) -> nn.Module:
    return _chain(nn.Conv2d(3, width, 3), second, nn.LazyConv2d(4, 1))


def _norms() -> nn.Module:
    first, second = (nn.Sequential(nn.Conv2d(n, m, 3, bias=False), nn.BatchNorm2d(m)) for n, m in ((3, 12), (12, 8)))
    return _chain(first, second, nn.Conv2d(8, 4, 1))


IMAGES, LINES, VOLUMES = (16, 3, 10, 10), (32, 3, 24), (8, 3, 6, 6, 6)
NETWORKS = {
    "linear": (lambda: _chain(nn.Linear(6, 20), nn.Linear(20, 10), nn.Linear(10, 4)), (256, 6)),
    "tokens": (lambda: _chain(nn.Linear(6, 20), nn.Linear(20, 4)), (32, 9, 6)),
    "strided": (lambda: _images(nn.Conv2d(12, 8, 3, 2, 1)), IMAGES),
    "reflected": (lambda: _images(nn.Conv2d(12, 8, 3, padding=2, dilation=2, padding_mode="reflect")), IMAGES),
    "grouped": (lambda: _images(nn.Conv2d(16, 16, 3, groups=4), 16), IMAGES),
    "depthwise": (lambda: _images(nn.Conv2d(16, 16, 3, groups=16, padding=1), 16), IMAGES),
    "one dimension": (lambda: _chain(nn.Conv1d(3, 12, 3), nn.Conv1d(12, 8, 5, 2), nn.Conv1d(8, 4, 1)), LINES),
    "three dimensions": (lambda: _chain(nn.Conv3d(3, 12, 2), nn.Conv3d(12, 6, (1, 3, 2)), nn.Conv3d(6, 4, 1)), VOLUMES),
    "transposed": (lambda: _images(nn.ConvTranspose2d(12, 8, 3, 2, 1, 1, dilation=2)), IMAGES),
    "transposed in groups": (
        lambda: _chain(nn.Conv1d(3, 12, 3), nn.ConvTranspose1d(12, 8, 4, 3, groups=2), nn.Conv1d(8, 4, 1)),
        LINES,
    ),
    "norms": (_norms, IMAGES),
    "functions": (Called, IMAGES),
    "residual": (Residual, (96, 3, 10, 10)),
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    model = make()
    model(torch.zeros(shape))  # shapes of lazy layers
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model, torch.randn(shape, dtype=torch.float64)


def planned(gm, ratio: float = 0.4):
    return stp_fx.plan_of(stp_fx.prune_graph(gm, "magnitude", ratio))


def error(model: nn.Module, gm, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((gm(x) - model(x)).square().mean())
