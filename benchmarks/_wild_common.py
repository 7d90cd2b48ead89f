"""How the networks of ``coverage.py wild`` are made, and what they take."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from _coverage_networks import Inputs, Network
from torch import Tensor, nn

__all__ = ["MakeInputs", "called", "made", "pixels", "random", "whole"]

MakeInputs = Callable[[int, bool, torch.dtype], Inputs]


def random(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whole(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(9))


def pixels(*shape: int, small: tuple[int, ...] | None = None) -> MakeInputs:
    """One tensor ``[batch, *shape]``; ``small`` where the network takes any size."""
    return lambda batch, is_small, dtype: ((random(batch, batch, *((is_small and small) or shape), dtype=dtype),), {})


def made(path: str, inputs: MakeInputs, *arguments: Any, **options: Any) -> Network:
    """``path`` is ``package.module:Class``, imported when the network is built: most of these packages import slowly."""

    def build() -> nn.Module:
        package, _, name = path.partition(":")
        return getattr(importlib.import_module(package), name)(*arguments, **options)

    return Network(build, inputs)


class _Called(nn.Module):
    def __init__(self, network: nn.Module, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.how = network, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.network, x)


def called(subject: Network, how: Callable[[Any, Tensor], Tensor]) -> Network:
    """The network called in another way: its own ``forward`` draws noise, or gives a loss beside the images."""
    return dataclasses.replace(subject, build=lambda: _Called(subject.build(), how))
