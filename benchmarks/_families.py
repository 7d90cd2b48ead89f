"""Networks of any size, for growth curves: wide, deep, residual and densely concatenated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZES = {
    "width": (256, 512, 1024, 2048, 4096, 8192),
    "depth": (10, 25, 50, 100, 200, 400, 800, 1600),
    "residual": (10, 25, 50, 100, 200, 400, 800, 1600),
    "dense": (10, 15, 20, 30, 45, 60, 90, 120),
}
MEANING = {
    "width": "two hidden layers of n units",
    "depth": "n times convolution, BatchNorm, ReLU",
    "residual": "n residual blocks of two convolutions on one stream",
    "dense": "n layers, each reading all before it",
}
_CHANNELS, _GROWTH, _PIXELS = 16, 8, 8


def build(family: str, size: int) -> tuple[nn.Module, Tensor]:
    """A network in eval mode with random weights, and an example for it."""
    torch.manual_seed(0)
    if family == "width":
        layers = [nn.Linear(64, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 10)]
        return nn.Sequential(*layers).eval(), torch.randn(1, 64)
    if family == "dense":
        body = nn.Sequential(*(_DenseLayer(_CHANNELS + _GROWTH * place) for place in range(size)))
        width = _CHANNELS + _GROWTH * size
    else:
        block = _Residual if family == "residual" else _plain
        body, width = nn.Sequential(*(block() for _ in range(size))), _CHANNELS
    stem = nn.Conv2d(3, _CHANNELS, 3, padding=1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return nn.Sequential(stem, body, head).eval(), torch.randn(1, 3, _PIXELS, _PIXELS)


def _plain(channels: int = _CHANNELS) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _plain(), _plain()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class _DenseLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, _GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)
