"""Progress of long work: a function is told of every step, and nothing is printed unless asked or on a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.errors import InputError
from stp_fx.measure.calibration import reiterable, watched
from stp_fx.progress import progress_of, steps

BATCHES = [torch.randn(4, 3, 8, 8) for _ in range(3)]


@pytest.fixture
def gm() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return stp_fx.trace(net.eval(), BATCHES[0][:1])


class Steps:
    """A function for ``progress`` that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int | None]] = []

    def __call__(self, work: str, done: int, total: int | None) -> None:
        self.calls.append((work, done, total))

    def of(self, work: str) -> list[tuple[int, int | None]]:
        return [(done, total) for name, done, total in self.calls if name == work]


def test_a_function_is_told_of_every_step_of_a_repair(gm: torch.fx.GraphModule, capsys: pytest.CaptureFixture[str]) -> None:
    told = Steps()
    options: dict[str, Any] = {"ratio": 0.5, "calibration": BATCHES, "compensation": "sequential"}
    pruned = stp_fx.prune_graph(gm, **options, recalibrate=2, progress=told)
    silent = stp_fx.prune_graph(gm, **options, recalibrate=2)
    assert told.of("sequential repair") == [(k, 3) for k in range(4)]
    assert told.of("sequential repair of layers") == [(k, 3) for k in range(4)]  # the three convolutions
    assert [done for done, _ in told.of("recalibrating BatchNorm")][:2] == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), silent.parameters(), strict=True))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("compensation", ["blockwise", "distillation"])
def test_training_blocks(gm: torch.fx.GraphModule, compensation: Any) -> None:
    told = Steps()
    stp_fx.prune_graph(gm, ratio=0.5, calibration=BATCHES, compensation=compensation, progress=told)
    done = told.of("training blocks")
    assert done[0][0] == 0
    assert done[-1][0] == done[-1][1] == len(done) - 1


def test_damages_sweeps_sensitivity_and_blocks(gm: torch.fx.GraphModule) -> None:
    told = Steps()
    stp_fx.sweep(gm, [0.25, 0.5], target="macs", allocation="optimal", calibration=BATCHES, progress=told)
    assert told.of("measuring damages") == [(0, 2), (1, 2), (2, 2)]
    stp_fx.sensitivity(gm, BATCHES, lambda graph, batch: graph(batch).square().mean(), ratios=[0.5], progress=told)
    assert told.of("measuring groups") == [(0, 2), (1, 2), (2, 2)]
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    blocks = stp_fx.trace(layers.eval(), torch.randn(2, 3, 8))
    stp_fx.score_blocks(blocks, "output", [torch.randn(4, 3, 8)], progress=told)
    assert told.of("scoring blocks")[-1][0] > 1


def test_a_bar_is_for_terminals_unless_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(progress: Any) -> str:
        with steps("counting", 2, progress) as done:
            done()
            done()
        return capsys.readouterr().err

    assert shown(None) == shown(False) == ""
    assert "counting" in shown(True)
    assert "100%" in shown(True)


@pytest.mark.parametrize("data", [BATCHES, iter(BATCHES), torch.zeros(2, 3, 8, 8)])
def test_data_carry_the_choice(data: Any) -> None:
    held = watched(data, print)
    assert progress_of(held) is print
    assert progress_of(reiterable(held)) is print
    assert len(list(held)) == len(list(held)) > 0
    assert progress_of(watched(BATCHES, None)) is None


@pytest.mark.parametrize("wrong", ["yes", 1, io])
@pytest.mark.parametrize("calibration", [None, BATCHES])
def test_other_values_are_refused(gm: torch.fx.GraphModule, wrong: Any, calibration: Any) -> None:
    with pytest.raises(InputError, match=r"`progress` is .*; give None, True, False, or a function \(work, done, total\)"):
        stp_fx.prune_graph(gm, calibration=calibration, progress=wrong)
    with pytest.raises(InputError, match="`progress` is"):
        stp_fx.sweep(gm, [0.5], calibration=calibration, progress=wrong)
