"""``regrow=True``: masked units compete with the others until the removal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import stp_fx
from stp_fx import PATPassManager
from stp_fx.analysis.groups import Group
from stp_fx.criteria.base import ScoreContext
from stp_fx.errors import InputError
from stp_fx.ir.provenance import is_mask_buffer, provenance_of

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(8) % 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.a, self.na = nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.nb = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.mid, self.head = nn.Linear(12, 20), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.nb(self.b(F.relu(self.na(self.a(x))))))
        return self.head(F.gelu(self.mid(x.mean((2, 3)))))


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    return stp_fx.trace(Net().double(), X)


def managed(**options: Any) -> tuple[PATPassManager, torch.optim.Optimizer]:
    gm = traced()
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
    return PATPassManager(gm, **{"ratio": 0.6, "steps": 3, "regrow": True, "optimizer": optimizer, **options}), optimizer


def trained(pat: PATPassManager, optimizer: torch.optim.Optimizer, epochs: range) -> None:
    for epoch in epochs:
        pat.prune(epoch)
        pat.model.train()
        for _ in range(2):
            F.cross_entropy(pat.model(X), Y).backward()
            optimizer.step()
            pat.step()
            optimizer.zero_grad()


def masked_units(pat: PATPassManager, tensor: str) -> set[int]:
    plan = provenance_of(pat.model).masked
    whole = set(range(pat.model.get_parameter(tensor).shape[0]))
    return set() if plan is None or (tensor, 0) not in plan.kept else whole - set(plan.kept[tensor, 0].tolist())


def scale(pat: PATPassManager, tensor: str, units: set[int], factor: float) -> None:
    with torch.no_grad():
        pat.model.get_parameter(tensor)[sorted(units)] *= factor


def test_a_unit_comes_back_where_others_score_lower() -> None:
    for regrow in (True, False):
        pat, _ = managed(regrow=regrow)
        pat.prune(0)
        first = masked_units(pat, "mid.weight")
        assert first
        scale(pat, "mid.weight", first, 100.0)
        pat.prune(1)
        second = masked_units(pat, "mid.weight")
        assert len(second) > len(first)
        assert (not first & second) if regrow else first < second
        pat.prune(2)
        kept = set(stp_fx.plan_of(pat.model).kept["mid.weight", 0].tolist())
        assert first <= kept if regrow else not first & kept
        assert provenance_of(pat.model).masked is None
        assert not any(is_mask_buffer(name) for name, _ in pat.model.named_buffers())


def test_a_unit_that_comes_back_computes_what_it_did() -> None:
    """Against the original module, whose head reads zero from what is masked now."""
    pat, _ = managed()
    pat.model.eval()
    pat.prune(0)
    scale(pat, "mid.weight", masked_units(pat, "mid.weight"), 100.0)
    pat.prune(1)
    plan = provenance_of(pat.model).masked
    eager = Net().double().eval()
    state = {name: value for name, value in pat.model.state_dict().items() if not is_mask_buffer(name)}
    eager.load_state_dict(state)
    with torch.no_grad():
        for name in ("a", "b", "mid", "head"):
            weight = eager.get_parameter(f"{name}.weight")
            removed = np.setdiff1d(np.arange(weight.shape[1]), plan.kept[f"{name}.weight", 1])
            weight[:, torch.from_numpy(removed)] = 0.0
        torch.testing.assert_close(pat.model(X), eager(X), rtol=1e-10, atol=1e-12)


def fixed(group: Group, context: ScoreContext) -> torch.Tensor:
    return torch.rand(group.size, generator=torch.Generator().manual_seed(group.index), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "global"},
        {"target": "macs"},
        {"target": "params", "scope": "global"},
        {"round_to": 4},
        {"max_ratio": 0.7, "scope": "global"},
        {"start_step": 1, "every": 2},
    ],
    ids=str,
)
def test_constant_scores_choose_the_same_with_and_without(options: dict[str, Any]) -> None:
    ends = []
    for regrow in (True, False):
        pat, optimizer = managed(regrow=regrow, criterion=fixed, **options)
        trained(pat, optimizer, range(4))
        assert pat.finished
        ends.append(pat.model)
    assert stp_fx.plan_of(ends[0]).to_json() == stp_fx.plan_of(ends[1]).to_json()
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_removal_is_the_masked_graph() -> None:
    pat, optimizer = managed(validate=True)
    trained(pat, optimizer, range(2))
    pat.model.eval()
    before = copy.deepcopy(pat.model)
    pat.prune(2)
    plan = stp_fx.plan_of(pat.model)
    expected = stp_fx.apply_plan(stp_fx.passes.UnmaskChannels()(before).graph_module, plan, mask=True)
    with torch.no_grad():
        torch.testing.assert_close(pat.model(X), expected(X), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", ["macs", "params"])
def test_targets_are_met_at_every_step(target: str) -> None:
    pat, optimizer = managed(target=target, ratio=0.5, scope="global")
    plain, plain_optimizer = managed(target=target, ratio=0.5, scope="global", regrow=False)
    whole = getattr(stp_fx.cost(pat.model), target)
    for epoch, ratio in enumerate(pat.ratios):
        trained(pat, optimizer, range(epoch, epoch + 1))
        trained(plain, plain_optimizer, range(epoch, epoch + 1))
        left = getattr(stp_fx.cost(pat.model), target) / whole
        assert left == pytest.approx(1 - ratio, abs=0.08)  # one of 12 channels is 8 %
        scale(pat, "mid.weight", masked_units(pat, "mid.weight"), 3.0)


def test_weights_and_optimizer_state_of_masked_units_are_kept() -> None:
    pat, optimizer = managed()
    optimizer = torch.optim.SGD(pat.model.parameters(), lr=0.1)
    pat.connect(optimizer)
    pat.prune(0)
    units = sorted(masked_units(pat, "mid.weight"))
    before = pat.model.get_parameter("mid.weight")[units].clone()
    trained(pat, optimizer, range(1))
    assert torch.equal(pat.model.get_parameter("mid.weight")[units], before)

    pat, adam = managed()
    trained(pat, adam, range(1))
    weight = pat.model.get_parameter("mid.weight")
    state = {key: value.clone() for key, value in adam.state[weight].items()}
    scale(pat, "mid.weight", masked_units(pat, "mid.weight"), 100.0)
    pat.prune(1)
    assert all(torch.equal(adam.state[weight][key], value) for key, value in state.items())
    back = sorted(set(units) - masked_units(pat, "mid.weight"))
    assert back
    pat.model(X).square().sum().backward()
    assert weight.grad[back].abs().sum(1).min() > 0


def test_followers_take_units_back_as_well() -> None:
    gm = traced()
    ema = torch.optim.swa_utils.AveragedModel(gm)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    pat = PATPassManager(gm, ratio=0.6, steps=3, regrow=True, optimizer=optimizer, followers=[ema])
    pat.prune(0)
    first = masked_units(pat, "mid.weight")
    scale(pat, "mid.weight", first, 100.0)
    for epoch in (1, 2):
        pat.prune(epoch)
        masks = [provenance_of(each).masked for each in (gm, ema.module)]
        assert masks[0] == masks[1] or masks[0].to_json() == masks[1].to_json()
    assert stp_fx.plan_of(gm).to_json() == stp_fx.plan_of(ema.module).to_json()
    assert first <= set(stp_fx.plan_of(ema.module).kept["mid.weight", 0].tolist())


@pytest.mark.parametrize("by_state", [True, False])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, by_state: bool, stop: int) -> None:
    def run(pat: PATPassManager, optimizer: torch.optim.Optimizer, epochs: range) -> None:
        for epoch in epochs:
            if epoch == 1:
                scale(pat, "mid.weight", masked_units(pat, "mid.weight"), 100.0)
            trained(pat, optimizer, range(epoch, epoch + 1))

    whole, optimizer = managed()
    run(whole, optimizer, range(5))
    first, first_optimizer = managed()
    run(first, first_optimizer, range(stop))
    second, second_optimizer = managed()
    if by_state:
        second.load_state_dict(first.state_dict())
        second.model.load_state_dict(first.model.state_dict())
        second_optimizer.load_state_dict(first_optimizer.state_dict())
    else:
        first.save(tmp_path / "run.pt")
        second.load(tmp_path / "run.pt")
    run(second, second_optimizer, range(stop, 5))
    assert second.state_dict() == whole.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))


def test_a_compiled_model_sees_units_come_back() -> None:
    pat, _ = managed()
    pat.model.eval()
    compiled = torch.compile(pat.model, backend="eager")
    for epoch in range(3):
        pat.prune(epoch)
        torch.testing.assert_close(compiled(X), pat.model(X), rtol=1e-10, atol=1e-12)
        scale(pat, "mid.weight", masked_units(pat, "mid.weight"), 100.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_until_last": False}, "mask_until_last=False every step removes"),
        ({"criterion": "variance", "train_loader": [X]}, "reads weights alone"),
        ({"criterion": "taylor", "train_loader": [(X, Y)]}, "reads weights alone"),
        ({"allocation": "optimal", "train_loader": [X]}, "allocation 'scope'"),
        ({"compensation": "mean", "train_loader": [X]}, "compensation=None"),
        ({"regrow": "yes"}, "regrow"),
    ],
)
def test_what_has_no_meaning_for_masked_units_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        managed(**options)
