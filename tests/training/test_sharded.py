"""Processes that hold a model in shards (fully_shard, DTensor) come to the plan and the network of one that holds it whole."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sharded_worker import CASES, Run

WORKER = Path(__file__).with_name("sharded_worker.py")
QUICK = ("cnn", "cnn mean", "cnn least squares", "cnn removes", "tensor parallel", "tensor parallel mean")
SLOW = ("vit", "vit least squares", "llama", "llama least squares", "llama tied")

pytestmark = [
    pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP does not run on a CPU (torch 2.6)"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def start(ranks: int, folder: Path, *names: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(WORKER)]
    done = subprocess.run([*command, str(folder), *names], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    start(2, path, "refused", "saved", *QUICK, "failing", "broken")
    return path


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded-by-four")
    start(4, path, *SLOW, "save")
    start(2, path, "load and save")
    start(4, path, "load")
    return path


def check(folder: Path, name: str, ranks: int) -> None:
    """Each rank has what one process has: plan, model and the optimizer's state."""
    alone = Run(CASES[name]).train(range(4)).result()
    for rank in range(ranks):
        found = torch.load(folder / f"{name}-{rank}.pt")
        assert found["plan"] == alone["plan"]
        assert found["plan"] is not None
        for part in ("model", "optimizer"):
            assert found[part].keys() == alone[part].keys()
            for key, value in alone[part].items():
                torch.testing.assert_close(found[part][key], value, rtol=1e-9, atol=1e-9, msg=f"{part} {key}")


@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_are_one_process(folder: Path, name: str) -> None:
    check(folder, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_four_ranks_are_one_process(of_four: Path, name: str) -> None:
    check(of_four, name, 4)


@pytest.mark.slow
def test_four_ranks_to_two_and_back_are_one_process(of_four: Path) -> None:
    """Saved masked by four, loaded and shortened by two, saved, loaded and trained on by four."""
    check(of_four, "vit mean", 4)
