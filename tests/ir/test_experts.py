"""Mixtures of experts, as people write them: the width of every expert is pruned, or the refusal says what to do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stp_fx
from stp_fx.errors import TraceError
from stp_fx.ir import provenance_of
from stp_fx.rules.ops.experts import grouped_mm_of_any_width

X = torch.randn(2, 6, 8)
EXPERTS, TOP = 3, 2


class Mixture(nn.Module):
    """``mix(tokens, weights, indices)`` between an embedding and a head; tokens are [b * t, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.head = nn.Linear(8, 16), nn.Linear(16, EXPERTS), nn.Linear(16, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).reshape(-1, 16)
        weights, indices = torch.topk(self.gate(tokens).softmax(-1), TOP)
        return self.head(self.mix(tokens, weights, indices)).view(x.shape[0], x.shape[1], 5)

    def mix(self, tokens: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        raise NotImplementedError


class ByWhere(Mixture):
    def mix(self, tokens: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        result, mask = torch.zeros_like(tokens), F.one_hot(indices, EXPERTS).permute(2, 1, 0)
        for k in range(EXPERTS):
            place, rows = torch.where(mask[k])
            result.index_add_(0, rows, self.experts[k](tokens[rows]) * weights[rows, place, None])
        return result


class ByNonzero(Mixture):
    def mix(self, tokens: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        result = tokens.new_zeros(tokens.shape)
        for k, expert in enumerate(self.experts):
            rows, place = (indices == k).nonzero(as_tuple=True)
            result = result.index_add(0, rows, weights[rows, place].unsqueeze(1) * expert(tokens[rows]))
        return result


class ByMask(Mixture):
    def mix(self, tokens: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        result = torch.zeros_like(tokens)
        for k, expert in enumerate(self.experts):
            chosen = indices == k
            mask, weight = chosen.any(-1), (weights * chosen).sum(-1)
            result[mask] += expert(tokens[mask]) * weight[mask].unsqueeze(-1)
        return result


class Dense(Mixture):
    def mix(self, tokens: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        gates = torch.zeros(tokens.shape[0], EXPERTS, dtype=tokens.dtype).scatter(1, indices, weights)
        return torch.einsum("te,teh->th", gates, torch.stack([expert(tokens) for expert in self.experts], 1))


class Grouped(Mixture):
    """Rows in the order of their experts, and one product for all."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        self.up, self.down = nn.Parameter(torch.randn(EXPERTS, 48, 16) / 4), nn.Parameter(torch.randn(EXPERTS, 16, 24) / 4)

    def mix(self, tokens: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        order = indices.flatten().argsort(stable=True)
        ends = F.one_hot(indices.flatten(), EXPERTS).sum(0).cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(tokens[order // TOP], self.up.transpose(1, 2), offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        return torch.zeros_like(tokens).index_add(0, order // TOP, rows * weights.flatten()[order, None])


ROUTED = [ByWhere, ByNonzero, ByMask, Dense]


@pytest.mark.parametrize("kind", ROUTED)
def test_the_width_of_experts_is_pruned(kind: type[Mixture]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    gm = stp_fx.trace(model, X, frontend="fx")
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    assert "masked = removed" in provenance_of(pruned).validation.ran
    shapes = {name: tuple(p.shape) for name, p in pruned.named_parameters()}
    assert [shapes[f"experts.{k}.0.weight"] for k in range(EXPERTS)] == [(12, 8)] * EXPERTS
    assert shapes["embed.weight"] == (8, 8), "the tokens' own width"
    more = torch.randn(5, 3, 8)
    torch.testing.assert_close(gm(more), model(more))
    assert pruned(more).shape == model(more).shape


grouped = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch before grouped_mm")


@grouped
@pytest.mark.parametrize("ratio", [0.5, 0.2])
def test_grouped_products(ratio: float) -> None:
    """Of 24, 12 or 20 are left, which are no whole 16 bytes in bfloat16."""
    torch.manual_seed(0)
    model = Grouped().eval()
    gm = stp_fx.trace(model, X, frontend="fx")
    pruned = stp_fx.prune_graph(gm, ratio=ratio)
    assert "masked = removed" in provenance_of(pruned).validation.ran, provenance_of(pruned).validation
    width = 24 - int(24 * ratio)
    assert pruned.get_parameter("down").shape[2] == width
    assert pruned.get_parameter("up").shape[1] == 2 * width
    assert grouped_mm_of_any_width in {n.target for n in pruned.graph.nodes}
    more = torch.randn(3, 6, 8)
    torch.testing.assert_close(gm(more), model(more))
    pruned(more).sum().backward()


@grouped
@pytest.mark.parametrize(("inner", "outer"), [(8, 16), (6, 16), (8, 3), (5, 5)])
def test_grouped_products_of_any_width(inner: int, outer: int) -> None:
    a, b = torch.randn(7, inner), torch.randn(2, inner, outer)
    found = grouped_mm_of_any_width(a, b, offs=torch.tensor([3, 7], dtype=torch.int32))
    torch.testing.assert_close(found, torch.cat([a[:3] @ b[0], a[3:] @ b[1]]), rtol=1e-4, atol=1e-5)


@grouped
def test_rows_of_grouped_products_count_once() -> None:
    gm = stp_fx.trace(Grouped().eval(), X, frontend="fx")
    rows = X.shape[0] * X.shape[1] * TOP
    work = stp_fx.cost(gm).per_node
    assert rows * 16 * 48 in work.values()


class SkipsIdle(Mixture):
    def mix(self, tokens: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        result = torch.zeros_like(tokens)
        for k, expert in enumerate(self.experts):
            rows, place = torch.where(indices == k)
            if rows.numel() == 0:
                continue
            result[rows] += expert(tokens[rows]) * weights[rows, place, None]
        return result


class VisitsHit(Mixture):
    def mix(self, tokens: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        result = torch.zeros_like(tokens)
        for hit in F.one_hot(indices, EXPERTS).sum((0, 1)).nonzero():
            rows, place = torch.where(indices == hit)
            result.index_add_(0, rows, self.experts[int(hit)](tokens[rows]) * weights[rows, place, None])
        return result


@pytest.mark.parametrize("kind", [SkipsIdle, VisitsHit])
def test_branches_on_who_is_selected_are_refused_with_what_to_do(kind: type[Mixture]) -> None:
    with pytest.raises(TraceError, match=r"asks how many positions data select.*Go through all experts"):
        stp_fx.trace(kind().eval(), X, frontend="fx")
