"""The training program on a small folder of images: logs, checkpoints, a kill in the middle, two processes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "imagenet_pat.py"
COMMON = [
    "--model", "shufflenet_v2_x0_5", "--image-size", "32", "--batch-size", "4", "--workers", "0", "--epochs", "4",
    "--lr", "0.01", "--pat-steps", "2", "--calibration-batches", "2", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draws = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, number in (("train", 8), ("val", 4)):
        for label, level in (("dark", 60), ("light", 190)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for k in range(number):
                pixels = np.clip(draws.normal(level, 40, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.png")
    return root


def command(images: Path, out: Path, *arguments: str) -> list[str]:
    return [str(PROGRAM), "--data", str(images), "--out", str(out), *COMMON, *arguments]


def run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "pruned.pt", weights_only=True)


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "log.csv").read_text().splitlines()))


EVERYTHING = [
    "--mac-target", "0.5", "--criterion", "variance", "--compensation", "mean", "--recalibrate", "--ema", "0.9", "--amp",
    "--kd-beta", "0.5", "--mixup", "0.2", "--label-smoothing", "0.1", "--optimizer", "adamw", "--regularizer", "group_lasso",
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(*command(images, out, *EVERYTHING))
    return out


def test_a_run_logs_and_ends_at_the_target(uninterrupted: Path) -> None:
    log = rows(uninterrupted)
    assert [int(row["epoch"]) for row in log] == [0, 1, 2, 3]
    macs = [int(row["macs"]) for row in log]
    assert macs[0] > macs[1] == macs[2] == macs[3]
    assert float(log[0]["regularization"]) > 0.0
    assert float(log[3]["regularization"]) == 0.0  # pruning is over
    assert all(0.0 <= float(row["ema_accuracy"]) <= 1.0 for row in log)
    assert (uninterrupted / "plan.json").exists()
    assert not (uninterrupted / "checkpoint.part").exists()


@pytest.mark.parametrize("after", [1, 3])
def test_killed_and_resumed_ends_with_the_same_weights(images: Path, uninterrupted: Path, tmp_path: Path, after: int) -> None:
    process = subprocess.Popen(
        [sys.executable, *command(images, tmp_path, *EVERYTHING)], stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not ((tmp_path / "log.csv").exists() and len(rows(tmp_path)) >= after):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "pruned.pt").exists()
    run(*command(images, tmp_path, *EVERYTHING, "--resume"))
    expected, found = weights(uninterrupted), weights(tmp_path)
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [row["epoch"] for row in rows(tmp_path)] == ["0", "1", "2", "3"]
    assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in rows(uninterrupted)]


def test_two_processes(images: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run(
        *launch,
        *command(images, tmp_path, "--ratio", "0.5", "--criterion", "variance", "--epochs", "2", "--compensation", "mean"),
    )
    assert [row["epoch"] for row in rows(tmp_path)] == ["0", "1"]
    assert weights(tmp_path)["conv5.0.weight"].shape[0] == 512


def test_help_and_bad_arguments(images: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), "--help"], capture_output=True, text=True)
    assert "--pat-steps" in done.stdout
    done = subprocess.run([sys.executable, *command(images, tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "one of --ratio and --mac-target" in done.stderr
    assert not list(tmp_path.iterdir())
