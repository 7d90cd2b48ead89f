"""Norms, activations and per-channel parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.testing.recipe import Block, Pick, Shape, block

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "relu_": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "hardsigmoid": nn.Hardsigmoid,
    "dropout": lambda: nn.Dropout(0.25),
}

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cos": torch.cos,
    "exp": lambda x: torch.exp(-x.abs()),
    "where": lambda x: torch.where(x > 0, x, 0.3 - x),
    "clamp": lambda x: x.clamp(-0.5, 0.8) + 1,
    "add_": lambda x: (x * 1.5).add_(0.25),
    "square": lambda x: (x + 0.5) ** 2 / 4,
    "tanh": lambda x: x.tanh() - 0.1,
    "logits": lambda x: F.logsigmoid(x),
}


@block("act")
class Activation(Block):
    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"name": pick.of(*ACTIVATIONS)}

    def __init__(self, at: Shape, name: str) -> None:
        super().__init__(at)
        self.act = ACTIVATIONS[name]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x * 1.0)  # a copy: an in-place activation must not reach what another branch reads


@block("function")
class Function(Block):
    """Activations as calls, most of them not zero at zero."""

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"name": pick.of(*FUNCTIONS)}

    def __init__(self, at: Shape, name: str) -> None:
        super().__init__(at)
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[self.name](x)


@block("bn")
class BatchNorm(Block):
    layouts = ("map",)

    def __init__(self, at: Shape) -> None:
        super().__init__(at)
        self.norm = BATCH_NORMS[at.rank - 1](at.channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@block("scale")
class Scale(Block):
    """One trained number a channel, multiplied or added, stored flat or ready to broadcast."""

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"how": pick.of("mul", "add", "gate"), "flat": pick.flag()}

    def __init__(self, at: Shape, how: str, flat: bool) -> None:
        super().__init__(at)
        self.how, self.flat = how, flat
        self.value = nn.Parameter(torch.randn(at.channels if flat else at.per_channel))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.value
        if self.flat and self.at.layout == "map":
            value = value.view(1, -1, *[1] * self.at.rank)
        if self.how == "mul":
            return x * value
        return x + value if self.how == "add" else x * torch.sigmoid(value)


@block("prelu")
class Prelu(Block):
    layouts = ("map",)

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"shared": pick.flag()}

    def __init__(self, at: Shape, shared: bool) -> None:
        super().__init__(at)
        self.act = nn.PReLU(1 if shared else at.channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)


@block("gn")
class GroupNorm(Block):
    layouts = ("map",)

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 2 or min(at.size) >= 2

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"groups": pick.of(1, pick.divisor(at.channels)), "affine": pick.flag()}

    def __init__(self, at: Shape, groups: int, affine: bool) -> None:
        super().__init__(at)
        self.norm = nn.GroupNorm(groups, at.channels, affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@block("in")
class InstanceNorm(Block):
    layouts = ("map",)

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return min(at.size) >= 2

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"affine": pick.flag(), "track": pick.flag()}

    def __init__(self, at: Shape, affine: bool, track: bool) -> None:
        super().__init__(at)
        self.norm = INSTANCE_NORMS[at.rank - 1](at.channels, affine=affine, track_running_stats=track)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@block("ln")
class LayerNorm(Block):
    """Over the channels; maps are permuted to channels-last and back."""

    @classmethod
    def options(cls, pick: Pick, at: Shape) -> dict[str, Any]:
        return {"how": pick.of("layer", "functional", "rms")}

    @classmethod
    def fits(cls, at: Shape) -> bool:
        return at.channels >= 2

    def __init__(self, at: Shape, how: str) -> None:
        super().__init__(at)
        self.functional = how == "functional"
        self.columns_suffice = how != "rms"  # its mean of squares reads what no column does
        if self.functional:
            self.weight, self.bias = nn.Parameter(torch.ones(at.channels)), nn.Parameter(torch.zeros(at.channels))
        else:
            self.norm = nn.RMSNorm(at.channels) if how == "rms" else nn.LayerNorm(at.channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(1, -1) if self.at.layout == "map" else x
        x = F.layer_norm(x, (self.at.channels,), self.weight, self.bias) if self.functional else self.norm(x)
        return x.movedim(-1, 1) if self.at.layout == "map" else x
