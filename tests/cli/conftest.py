"""A folder with a small model in a file, as the current one."""

from __future__ import annotations

import pathlib
import sys

import pytest

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=8, classes=10):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.Conv2d(width, 16, 3, padding=1)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, ids, mask):
        return self.second(torch.relu(self.first(self.table(ids) * mask.unsqueeze(-1))))


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 48), nn.Linear(16, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def make(width=8):
    return Net(width)


def batches():
    torch.manual_seed(0)
    return [(torch.randn(4, 1, 8, 8), torch.arange(4)) for _ in range(3)]


def loss(graph, batch):
    return graph(batch[0]).square().mean()


def infinite(graph, batch):
    return graph(batch[0]).sum() * float("inf")


def broken():
    raise RuntimeError("no luck")


def number():
    return 3


def nothing_to_prune():
    return nn.Linear(4, 4)


module = Net()
"""


@pytest.fixture(autouse=True)
def project(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "failing.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path
