"""A whole run in one file: what goes on after a restart is bit for bit what would have gone on without."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import stp_fx
from stp_fx.errors import FileError, InputError

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


class Loop:
    """Data drawn at random by torch, NumPy and Python, dropout, a learning-rate schedule, a GradScaler, an EMA."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(6, 12, bias=False), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 3)
        )
        self.gm = stp_fx.trace(net, X)
        self.ema = AveragedModel(self.gm, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.optimizer = torch.optim.AdamW(self.gm.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.scaler = torch.amp.GradScaler("cpu")
        options = {"steps": 3, "compensation": "mean", "regularizer": "growing", **options}
        self.pat = stp_fx.PATPassManager(
            self.gm, ratio=0.5, train_loader=[X], optimizer=self.optimizer, followers=[self.ema], every=2, start_step=2, **options
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            scale = random.random() + np.random.rand()
            x = X + 0.1 * scale * torch.randn_like(X)
            self.optimizer.zero_grad()
            self.scaler.scale(self.gm.train()(x).square().mean()).backward()
            self.scaler.unscale_(self.optimizer)
            self.pat.regularize()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.ema.update_parameters(self.gm)
            self.pat.step()

    def objects(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "scaler": self.scaler}

    def values(self) -> dict[str, torch.Tensor]:
        return {**self.gm.state_dict(), **{f"ema.{key}": value for key, value in self.ema.state_dict().items()}}


def seeded() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_it_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    first = Loop()
    seeded()
    first.train(stop)
    first.pat.save(tmp_path / "run.pt", **first.objects())
    first.train(9 - stop)
    second = Loop()
    second.pat.load(tmp_path / "run.pt", **second.objects())
    second.train(9 - stop)
    assert second.pat.finished
    expected, found = first.values(), second.values()
    assert list(expected) == list(found)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = Loop()
    first.train(3)
    first.pat.save(path, **first.objects())
    second = Loop()
    before = {key: value.clone() for key, value in second.values().items()}
    with pytest.raises(InputError, match=r"'scaler', 'scheduler'; to load into were given nothing"):
        second.pat.load(path)
    with pytest.raises(InputError, match="`scaler` is None"):
        first.pat.save(path, scaler=None)
    with pytest.raises(FileError, match="no file"):
        second.pat.load(tmp_path / "none.pt", **second.objects())
    (tmp_path / "damaged.pt").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match="damaged"):
        second.pat.load(tmp_path / "damaged.pt", **second.objects())
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(FileError, match="not written by"):
        second.pat.load(tmp_path / "other.pt", **second.objects())
    with pytest.raises(InputError, match="another schedule"):
        Loop(steps=2).pat.load(path, **second.objects())
    assert all(torch.equal(value, before[key]) for key, value in second.values().items())
    second.pat.load(path, **second.objects())
    assert second.pat.taken == 1


def test_weights_of_another_model_are_refused_before_anything_changes(tmp_path: Path) -> None:
    first = Loop()
    first.train(2)
    first.pat.save(tmp_path / "run.pt")
    found = torch.load(tmp_path / "run.pt", weights_only=True)
    found["model"]["3.weight"] = found["model"]["3.weight"][:5]
    torch.save(found, tmp_path / "other.pt")
    second = Loop()
    with pytest.raises(InputError, match=r"state of the model does not fit: '3.weight' has shape \(5, 12\)"):
        second.pat.load(tmp_path / "other.pt")
    assert second.pat.taken == 0
    assert not any(name.startswith("stp_fx") for name, _ in second.gm.named_buffers())
