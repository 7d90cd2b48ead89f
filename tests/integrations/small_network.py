"""A network and data that all integrations train, small enough for seconds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

import stp_fx

IMAGES = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 4
PAT: dict[str, Any] = {"criterion": "variance", "ratio": 0.5, "steps": 3, "compensation": "mean", "round_to": 1}


class Net(nn.Module):
    """About 3,000 parameters; `mid` has no bias, and gets one when its inputs go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv, self.mid, self.head = nn.Conv2d(12, 16, 3, padding=1), nn.Linear(16, 20, bias=False), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(F.relu(self.norm(self.stem(x)))))
        return self.head(F.gelu(self.mid(x.mean((2, 3)))))


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.trace(Net(), IMAGES[:2])


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)
