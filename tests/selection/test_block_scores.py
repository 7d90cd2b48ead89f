"""Scores of blocks against references in loops, and the choice of blocks for a share of the cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stp_fx
from stp_fx.errors import InputError, TargetError
from stp_fx.passes import MaskBlocks, Pipeline, RemoveBlocks, SelectBlocks
from stp_fx.selection.block_choice import select_blocks

SCALES = {"blocks.0": 0.5, "blocks.1": 0.01, "blocks.2": 1.0}


class Net(nn.Module):
    """Three residual MLPs over tokens, of different weight and width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, w), nn.Tanh(), nn.Linear(w, 4)) for w in (4, 8, 2))
        self.head = nn.Linear(4, 2)

    def values(self, x: torch.Tensor, without: str | None = None) -> list[torch.Tensor]:
        found = [self.stem(x)]
        for k, block in enumerate(self.blocks):
            found.append(found[-1] + SCALES[f"blocks.{k}"] * block(found[-1]) * (f"blocks.{k}" != without))
        return found

    def forward(self, x: torch.Tensor, without: str | None = None) -> torch.Tensor:
        return self.head(self.values(x, without)[-1].mean(1))


@pytest.fixture(scope="module")
def case() -> tuple[Net, Any, list[Any]]:
    torch.manual_seed(0)
    net = Net().double().eval().requires_grad_(False)
    data = [(torch.randn(4, 3, 3, dtype=torch.double), torch.randint(0, 2, (4,))) for _ in range(2)]
    return net, stp_fx.trace(net, data[0][0], validate=False), data


def reference(net: Net, data: list[Any], criterion: str, name: str) -> float:
    k, found = int(name[-1]), []
    for x, target in data:
        values = net.values(x)
        before, after = values[k], values[k + 1]
        if criterion == "influence":
            found.append(
                1
                - torch.stack(
                    [F.cosine_similarity(a, b, dim=0) for a, b in zip(before.reshape(-1, 4), after.reshape(-1, 4), strict=True)]
                )
            )
        elif criterion == "taylor":
            gate = torch.ones((), dtype=torch.double, requires_grad=True)
            stream = before + gate * (after - before)
            for j in range(k + 1, 3):
                stream = stream + SCALES[f"blocks.{j}"] * net.blocks[j](stream)
            loss = F.cross_entropy(net.head(stream.mean(1)), target)
            found.append(torch.autograd.grad(loss, gate)[0].abs())
        elif criterion == "loss":
            found.append(F.cross_entropy(net(x, name), target) - F.cross_entropy(net(x), target))
        elif criterion == "output":
            found.append((net(x, name) - net(x)).square().sum())
        else:
            found.append((after - before).square().sum())
    if criterion in ("influence", "taylor", "loss"):
        return float(torch.stack(found).mean())
    if criterion == "output":
        whole = torch.cat([net(x) for x, _ in data])
        return float(sum(found) / (whole - whole.mean(0)).square().sum())
    return float(sum(found) / sum(net.values(x)[k + 1].square().sum() for x, _ in data))


@pytest.mark.parametrize("criterion", ["influence", "error", "taylor", "output", "loss"])
def test_scores_are_those_of_a_reference(case: tuple[Net, Any, list[Any]], criterion: Any) -> None:
    net, gm, data = case
    code = gm.code
    found = stp_fx.score_blocks(gm, criterion, data)
    assert list(found) == list(SCALES)
    for name, score in found.items():
        assert score == pytest.approx(reference(net, data, criterion, name), rel=1e-5, abs=1e-12)
    assert gm.code == code
    assert not any(name.startswith("stp_fx_block") for name, _ in gm.named_modules())


def test_scores_refuse_what_they_cannot_use(case: tuple[Net, Any, list[Any]]) -> None:
    _, gm, data = case
    with pytest.raises(InputError, match="influence, error"):
        stp_fx.score_blocks(gm, "angle", data)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="calibration"):
        stp_fx.score_blocks(gm, "influence")
    with pytest.raises(InputError, match="loss"):
        stp_fx.score_blocks(gm, "taylor", data, loss=lambda network, batch: 1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(stp_fx.errors.CriterionError, match=r"blocks\.0"):
        stp_fx.score_blocks(gm, "error", [data[0][0] * float("nan")])


def test_lowest_scores_go_until_the_target_is_met(case: tuple[Net, Any, list[Any]]) -> None:
    _, gm, _ = case
    scores = {"blocks.0": 1.0, "blocks.1": 3.0, "blocks.2": 2.0}
    whole, sizes = stp_fx.cost(gm).params, {block.name: block.params for block in stp_fx.blocks_of(gm)}
    assert select_blocks(gm, scores, 0.0).is_empty
    assert select_blocks(gm, scores, 0.9 * sizes["blocks.0"] / whole, target="params").blocks == ("blocks.0",)
    both = (sizes["blocks.0"] + sizes["blocks.2"]) / whole
    assert select_blocks(gm, scores, both, target="params").blocks == ("blocks.0", "blocks.2")
    # a third is needed, and makes the first two needless as far as it can
    assert select_blocks(gm, scores, (sizes["blocks.1"] + 1) / whole, target="params").blocks == ("blocks.0", "blocks.1")
    assert select_blocks(gm, scores, 0.5, target="blocks").blocks == ("blocks.0", "blocks.2")
    assert select_blocks(gm, scores, 0.1, per_cost=True).blocks == ("blocks.0",)
    with pytest.raises(TargetError, match=r"removes .*% of the macs"):
        select_blocks(gm, scores, 0.99)
    for wrong in ({"ratio": 1.0}, {"ratio": 0.5, "target": "channels"}):
        with pytest.raises(InputError):
            select_blocks(gm, scores, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no such block"):
        select_blocks(gm, {"nothing": 1.0}, 0.1)


@pytest.mark.parametrize("iterative", [False, True])
def test_a_pipeline_selects_and_removes(case: tuple[Net, Any, list[Any]], iterative: bool) -> None:
    net, gm, data = case
    select = SelectBlocks(0.6, "blocks", "output", data, iterative=iterative)
    removed = Pipeline(select, RemoveBlocks())(gm).graph_module
    first, *_ = sorted(SCALES, key=lambda name: reference(net, data, "output", name))
    assert first in stp_fx.plan_of(removed).blocks
    assert len(stp_fx.plan_of(removed).blocks) == 2
    masked = Pipeline(select, MaskBlocks())(gm).graph_module
    torch.testing.assert_close(masked(data[0][0]), removed(data[0][0]), rtol=0, atol=1e-14)
    with pytest.raises(TargetError):
        Pipeline(SelectBlocks(0.99, "params", "error", data, iterative=iterative), RemoveBlocks())(gm)
