"""A regularizer that aims acts on what the manager's next step removes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import stp_fx
from stp_fx import PATPassManager, regularizers
from stp_fx.ir import provenance_of
from stp_fx.passes import MaskChannels, Pipeline, ScoreUnits, SelectUnits
from stp_fx.selection import Selection

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.trace(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)), X)


def managed(gm: fx.GraphModule, **options: Any) -> tuple[PATPassManager, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(gm.parameters(), 0.01, momentum=0.9)
    growing = regularizers.GrowingReg(0.1, ratio=None, every=1)
    given = {"ratio": 0.5, "steps": 3, "end_epoch": 4, "regularizer": growing, "optimizer": optimizer, **options}
    return PATPassManager(gm, **given), optimizer


def pushed(pat: PATPassManager) -> dict[str, list[int]]:
    """By group, the units whose weights are pushed."""
    for parameter in pat.model.parameters():
        parameter.grad = None
    pat.regularize()
    names = {"0": "0.bias", "2": "2.bias"}
    return {
        name: torch.nonzero(bias.grad).flatten().tolist()
        for name, bias in ((name, pat.model.get_parameter(bias)) for name, bias in names.items())
        if bias.grad is not None
    }


def trained(pat: PATPassManager, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    pat.model(X).square().mean().backward()
    pat.regularize()
    optimizer.step()
    pat.step()


def next_units(pat: PATPassManager, ratio: float) -> dict[str, list[int]]:
    """By group, the unmasked units of lowest magnitude: what a plain plan at the ratio of the next step takes."""
    passes = Pipeline(ScoreUnits("magnitude"), SelectUnits(Selection(ratio)), MaskChannels())
    masked, before = provenance_of(passes(pat.model).graph_module).masked, provenance_of(pat.model).masked
    found = {}
    for name, size in (("0", 12), ("2", 10)):
        kept = set(masked.kept[f"{name}.weight", 0].tolist())
        earlier = set(range(size)) if before is None else set(before.kept[f"{name}.weight", 0].tolist())
        found[name] = sorted(earlier - kept)
    return found


def test_it_aims_when_made_and_after_each_step() -> None:
    pat, optimizer = managed(traced(), schedule="linear")
    assert pushed(pat) == next_units(pat, pat.ratios[0])
    assert pat.prune(0)
    assert pushed(pat) == next_units(pat, pat.ratios[1])
    assert all(pushed(pat).values())
    trained(pat, optimizer)
    assert pat.prune(2)
    assert pushed(pat) == next_units(pat, pat.ratios[2])
    assert pat.prune(4)
    assert pat.finished
    assert pat.regularize() == 0.0


def test_scores_are_looked_at_anew_at_each_epoch() -> None:
    pat, _ = managed(traced())
    pat.prune(0)
    before = pushed(pat)
    with torch.no_grad():
        for name, units in before.items():
            pat.model.get_parameter(f"{name}.weight")[units] *= 100.0
    assert pushed(pat) == before
    assert not pat.prune(1)
    assert not set(pushed(pat)["0"]) & set(before["0"])


def test_criteria_that_read_data_aim_at_steps_alone() -> None:
    read = []

    class Loader:
        def __iter__(self) -> Any:
            read.append(1)
            return iter([X])

    pat, _ = managed(traced(), criterion="variance", train_loader=Loader())
    assert len(read) == 1
    assert all(pushed(pat).values())
    pat.prune(0)
    after_step = len(read)
    assert after_step > 1
    pat.prune(1)
    assert len(read) == after_step


def test_a_removal_between_the_steps() -> None:
    pat, optimizer = managed(traced(), mask_until_last=False)
    pat.prune(0)
    trained(pat, optimizer)
    small = pat.model.get_submodule("0").out_features
    assert small < 12
    assert 0 < len(pushed(pat)["0"]) < small


def test_a_step_that_cannot_say_what_comes_next_changes_nothing() -> None:
    class Loader:
        times = 0

        def __iter__(self) -> Any:
            Loader.times += 1
            if Loader.times == 3:  # when made, for the step, and for what follows it
                raise OSError("the disk is away")
            return iter([X])

    pat, optimizer = managed(traced(), criterion="variance", train_loader=Loader())
    before = copy.deepcopy((pat.state_dict(), pat.model.state_dict(), optimizer.state_dict()))
    with pytest.raises(stp_fx.errors.StpFxError, match="the disk is away"):
        pat.prune(0)
    for now, then in zip((pat.state_dict(), pat.model.state_dict(), optimizer.state_dict()), before, strict=True):
        assert str(now) == str(then)
    assert pat.prune(0)


@pytest.mark.parametrize("by_state", [True, False])
def test_a_resumed_run_pushes_the_same(tmp_path: Path, by_state: bool) -> None:
    def run(pat: PATPassManager, optimizer: torch.optim.Optimizer, epochs: range) -> None:
        for epoch in epochs:
            pat.prune(epoch)
            trained(pat, optimizer)

    whole, optimizer = managed(traced())
    run(whole, optimizer, range(6))
    first, first_optimizer = managed(traced())
    run(first, first_optimizer, range(2))
    second, second_optimizer = managed(traced())
    if by_state:
        second.load_state_dict(first.state_dict())
        second.model.load_state_dict(first.model.state_dict())
        second_optimizer.load_state_dict(first_optimizer.state_dict())
    else:
        first.save(tmp_path / "run.pt")
        second.load(tmp_path / "run.pt")
    assert pushed(second) == pushed(first)
    run(second, second_optimizer, range(2, 6))
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))


def test_with_optimizer_steps() -> None:
    pat, optimizer = managed(traced(), start_step=2, every=2, end_epoch=None)
    first = pushed(pat)
    assert all(first.values())
    trained(pat, optimizer)
    trained(pat, optimizer)
    assert pat.taken == 1
    assert pushed(pat) == next_units(pat, pat.ratios[1])
