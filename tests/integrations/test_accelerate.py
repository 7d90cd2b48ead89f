"""The example's loop with the real library: a few batches an epoch, resumed across the removal, in one and two processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_network import IMAGES, LABELS, PAT, same, traced
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stp_fx
from stp_fx.errors import InputError

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from stp_fx.integrations.accelerate import pat_manager

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_pat.py"
SHORT = ["--cpu", "--epochs", "5", "--start-epoch", "1", "--width", "8", "--max-batches", "2"]


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    yield
    forget()


def forget() -> None:
    """Accelerate keeps its state in the process: one precision for all."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("accelerate_pat", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_example_goes_on_from_its_checkpoints(
    example: ModuleType, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved among masks and after the removal; in bf16 Accelerate keeps the function of the graph's forward."""
    options = [*SHORT, "--accumulate", "2", "--mixed-precision", precision]
    whole, right = example.main([*options, "--output", str(tmp_path / "first")])
    shares = [float(line.split("MACs ")[1].split("%")[0]) for line in capsys.readouterr().out.splitlines() if "MACs " in line]
    assert shares[0] == 100.0
    assert shares[0] > shares[1] > shares[2] > shares[3] == shares[4] == pytest.approx(50, abs=4)
    assert stp_fx.cost(whole).params == sum(p.numel() for p in whole.parameters())
    for epoch in (2, 3):
        forget()
        path = str(tmp_path / "first" / f"epoch-{epoch}")
        resumed, again = example.main([*options, "--output", str(tmp_path / "second"), "--resume", path])
        assert same(whole, resumed)
        assert again == right


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = traced()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def prepared(accelerator: Accelerator, model: nn.Module, **options: Any) -> tuple[Any, stp_fx.PATPassManager, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)
    ready, stepping, loader = accelerator.prepare(model, optimizer, data)
    return stepping, pat_manager(accelerator, ready, optimizer=stepping, train_loader=loader, **options), loader


def test_the_state_of_the_optimizer_and_what_is_trained_follow() -> None:
    accelerator, model = Accelerator(cpu=True), Wrapped()
    parameters = dict(model.net.named_parameters())
    optimizer, pat, loader = prepared(accelerator, model, **PAT, regularizer="growing")
    weights = []
    for epoch in range(5):
        assert pat.prune(epoch) == (epoch < 3)
        assert pat.parallel is model
        for x, y in loader:
            accelerator.backward(F.cross_entropy(pat.parallel(x), y))
            pat.regularize()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.net.conv.weight.detach().clone())
    assert model.net.conv.weight.shape == (8, 6, 3, 3)
    assert not torch.equal(weights[3], weights[4])
    assert pat.regularizer.steps == 3 * 2  # type: ignore[union-attr]  # until the last step
    for name, parameter in model.net.named_parameters():
        assert parameters.get(name, parameter) is parameter
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert loader.iteration == 5  # what pruning has read is no epoch


def test_two_managers_of_one_accelerator(tmp_path: Path) -> None:
    def started() -> tuple[Accelerator, list[stp_fx.PATPassManager]]:
        accelerator = Accelerator(cpu=True)
        return accelerator, [prepared(accelerator, Wrapped(), ratio=ratio, name=str(ratio))[1] for ratio in (0.5, 0.25)]

    accelerator, managers = started()
    for manager in managers:
        manager.prune(0)
    accelerator.save_state(str(tmp_path))
    forget()
    other, fresh = started()
    other.load_state(str(tmp_path))
    for old, new in zip(managers, fresh, strict=True):
        assert same(old.model, new.model)
    os.remove(tmp_path / "stp_fx_0.25.pt")
    with pytest.raises(InputError, match=r"stp_fx_0\.25\.pt"):
        other.load_state(str(tmp_path))


def test_bad_arguments() -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(InputError, match="third"):
        prepared(accelerator, Wrapped(), graph="third")
    with pytest.raises(InputError, match=r"stp_fx\.trace"):
        prepared(accelerator, nn.Linear(3, 3))


@pytest.mark.slow  # importing the compiler is
def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(InputError, match="OptimizedModule"):
        pat_manager(Accelerator(cpu=True), torch.compile(traced()))  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel made anew at the removal; a run resumed among masks ends with the same weights."""
    pytest.importorskip("sklearn")
    saved = []
    for folder, more in (("first", []), ("second", ["--resume", str(tmp_path / "first" / "epoch-2")])):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                   str(EXAMPLE), *SHORT, "--output", str(tmp_path / folder), *more]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("accuracy") == (2 if more else 5)
        saved.append(load_file(tmp_path / folder / "epoch-4" / "model.safetensors"))
        assert done.stdout.startswith("2 processes")
    assert saved[0]["conv1.weight"].shape[0] < 16
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
