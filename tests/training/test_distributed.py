"""Two processes with half the data each come to the plan of one with all of it, and train one smaller model under DDP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from distributed_worker import batches, plan

import stp_fx

WORKER = Path(__file__).with_name("distributed_worker.py")
METHODS = (("variance", "mean"), ("taylor", None), ("reconstruction", "least_squares"), ("magnitude", "sequential"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return path


@pytest.mark.parametrize(("criterion", "compensation"), METHODS)
def test_half_the_data_each_gives_the_plan_of_all_of_it(folder: Path, criterion: str, compensation: str | None) -> None:
    whole = plan(criterion, batches(), compensation)
    for rank in (0, 1):
        assert stp_fx.PrunePlan.from_json((folder / f"{criterion}-{rank}.json").read_text()) == whole
    half = plan(criterion, batches(0, 2), compensation)
    assert half != whole or criterion != "taylor"  # half of the data alone says something else
