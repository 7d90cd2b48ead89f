"""``stp-fx doctor``: versions, and the smallest part of a model that cannot be captured."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

import stp_fx
from stp_fx.cli import main

PROGRAM = """
import torch
from torch import nn

class Loops(nn.Module):
    def forward(self, x, scale=1.0):
        while x.sum() > 0:  # data decide how often
            x = x - scale
        return x

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(1, 4, 3), Loops()

    def forward(self, x):
        return self.inner(self.conv(x), scale=100.0)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(1, 1, 1), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

class Wrong(nn.Module):
    def forward(self, x):
        return x.nothing

fine = nn.Conv2d(1, 2, 3)
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "broken.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, code: int = 0) -> str:
        found = main(["doctor", *argv])
        out, err = capsys.readouterr()
        assert found == code, err
        return out

    return run


def test_versions(run: Any) -> None:
    out = run()
    assert f"stp_fx {stp_fx.__version__}" in out
    assert f"torch {torch.__version__}" in out
    found = json.loads(run("--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert "failure" not in found
    assert set(found["optional"]) | set(found["missing"]) >= {"timm", "onnx"}


def test_a_model_that_can_be_captured(run: Any) -> None:
    assert "broken.py:fine can be captured." in run("broken.py:fine", "-i", "1,1,8,8")


def test_the_smallest_part_is_found_and_shown(run: Any) -> None:
    out = run("broken.py:Net", "-i", "1,1,8,8", code=1)
    assert "The smallest part that cannot: blocks.1.inner, a" in out
    assert "while x.sum() > 0" in out
    found = json.loads(run("broken.py:Net", "-i", "1,1,8,8", "--json", code=1))["failure"]["part"]
    assert found["module"] == "blocks.1.inner"
    program = found["program"].replace("...", "given")
    assert "torch.zeros([1, 4, 6, 6], dtype=torch.float32)" in program
    namespace: dict[str, Any] = {}
    exec((pathlib.Path("broken.py")).read_text(), namespace)
    with pytest.raises(stp_fx.errors.TraceError):
        exec(program, {"given": namespace["Net"]()})


def test_a_model_that_fails_itself(run: Any) -> None:
    out = run("broken.py:Wrong", "-i", "1,1,8,8", code=1)
    assert "the model itself fails: AttributeError" in out
    assert "The smallest part" not in out


def test_unknown_models_are_reported(run: Any) -> None:
    assert "the model itself fails" in run("broken.py:nothing", code=1)
