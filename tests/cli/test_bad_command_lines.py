"""Command lines that nobody can mean: exit code 1 or 2 and a line that says why; never an unexpected failure (3), no code run."""

from __future__ import annotations

import os
import pathlib
import pickle
import sys
from typing import Any

import pytest
import torch

from stp_fx.cli import main

BASE = ("prune", "net:make", "-i", "1,1,8,8", "--validate", "no", "--dry-run")


class Runs:
    """A pickle that would leave a file behind."""

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (pathlib.Path("ran"),)


def weights(name: str) -> str:
    """A file that is no state dict."""
    path = pathlib.Path(f"{name}.safetensors" if name.startswith("st") else f"{name}.pth")
    state = torch.nn.Conv2d(1, 1, 1).state_dict()
    contents: dict[str, Any] = {
        "empty": b"", "text": b"junk", "nul": b"\0" * 100, "zip": b"PK\x03\x04" + b"\0" * 50, "pickle": pickle.dumps(Runs()),
        "number": pickle.dumps(5), "stop": b".", "cut": b"\x80\x02", "odd": b"\x80\x05\x95\xff", "key": b"cnothing\nnowhere\n.",
        "memo": b"h\x05.", "st-empty": b"", "st-text": b"junk" * 9, "st-huge": b"\xff" * 64,
        "unicode": b"X\x04\0\0\0\xff\xff\xff\xff.",
    }  # fmt: skip
    values: dict[str, Any] = {
        "list": [1], "integers": {1: torch.ones(1)}, "mixed": {1: torch.ones(1), "a": torch.ones(1)}, "none": None,
        "itself": {"state_dict": {"model": 3}}, "sparse": {k: torch.ones(2, 2).to_sparse() for k in ("stem.weight",)},
        "other": state,
    }  # fmt: skip
    if name in contents:
        path.write_bytes(contents[name])
    else:
        torch.save(values[name], path)
    return str(path)


JUNK = ("empty", "text", "nul", "zip", "pickle", "number", "stop", "cut", "odd", "key", "memo", "unicode", "st-empty", "st-text")
JUNK += ("st-huge", "list", "integers", "mixed", "none", "itself", "sparse", "other")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert code in (1, 2), (argv, code, err)
    assert "Traceback" not in err
    assert out == ""
    assert not pathlib.Path("ran").exists()
    return err


@pytest.mark.parametrize("name", JUNK)
def test_weights_that_are_none(name: str, project: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--weights" in refused(capsys, *BASE, "-w", weights(name))


@pytest.mark.skipif(os.name != "posix", reason="devices of POSIX")
def test_weights_that_are_no_file(project: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("/dev/zero", ".", "a\0b", "\udcff", "x" * 5000):
        assert "--weights" in refused(capsys, *BASE, "-w", path)


OPTIONS = (
    "-a",
    "-i",
    "--from",
    "--device",
    "-r",
    "-t",
    "--ratios",
    "--ignore",
    "--round-to",
    "--max-ratio",
    "--products",
    "-c",
    "-o",
)
OPTIONS += ("--recalibrate", "--seed", "--pipeline", "--calibration", "--batches", "--loss", "--compensation", "--scope")
VALUES = ("", "x", "nan", "inf", "-1", "1e400", "1" * 400, "[" * 3000, "width=" + "[" * 20_000, "width=" + "-" * 20_000 + "1")
VALUES += (
    "a\0b",
    "\udcff",
    "net:",
    ":",
    "net:nothing",
    "net.py",
    "net:number",
    "net:broken",
    "width=()",
    "1,3,99999999,99999999",
)
VALUES += (
    "/dev/zero",
    ".",
    "net:Net",
    "ScoreUnits(" * 500,
    "ScoreUnits(__import__('os').system('touch ran'))",
    "*",
    "[",
    "stem=nan",
)


@pytest.mark.parametrize("option", OPTIONS)
def test_values_that_are_none(option: str, project: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in VALUES:
        code = main(
            [*BASE, f"{option}={value}" if option.startswith("--") else option, *([] if option.startswith("--") else [value])]
        )
        err = capsys.readouterr().err
        assert code != 3, (option, value[:40], err)
        assert not pathlib.Path("ran").exists(), value


MODELS = (
    "",
    ":",
    "::",
    "timn:resnet18",
    "tim",
    "resnet5",
    "net",
    "net.py",
    "net.py:",
    "net.py:nothing",
    "./net",
    "a\0b:x",
    "\udcff:x",
)
MODELS += (
    "x" * 5000,
    "x." * 3000 + ":y",
    "..:x",
    ".net:make",
    "os:system",
    "net:make.__globals__",
    "/dev/zero:x",
    "torchvision:",
    "timm:",
)


@pytest.mark.parametrize("model", MODELS)
def test_models_that_are_none(model: str, project: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "analyze", model, "-i", "1,1,8,8")


@pytest.mark.parametrize("model", ["resnet5", "timm:nothing", "timm"])
def test_a_mistyped_model_runs_no_file_of_the_folder(
    model: str, project: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [each for each in sys.modules if each.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    pathlib.Path("timm.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    refused(capsys, "analyze", model)
