"""``torch.vmap`` over single indices, as masks are made of: the graph is what the model does, at other sizes too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.errors import TraceError
from stp_fx.ir.provenance import provenance_of


def mapped(function: Callable[..., Any], *dims: tuple[int | None, ...]) -> Callable[..., Any]:
    for each in dims:
        function = torch.vmap(function, in_dims=each)
    return function


class Masked(nn.Module):
    """Attention whose mask a function of (batch, query, key) says."""

    def __init__(self, mask: Callable[..., Any], levels: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.mask, self.levels = nn.Linear(6, 8), nn.Linear(8, 6), mask, levels

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        batch, times = torch.arange(x.shape[0]), torch.arange(x.shape[1])
        function: Any = lambda b, q, k: self.mask(kept, b, q, k)  # noqa: E731
        if self.levels == 3:
            mask = mapped(function, (None, None, 0), (None, 0, None), (0, None, None))(batch, times, times)
        else:  # two arguments in one level
            mask = mapped(function, (None, 0, 0))(batch[0], times, times)
        scores = y @ y.transpose(1, 2)
        return self.b(scores.masked_fill(~mask, -1e4).softmax(-1) @ y)


def drawn(batch: int, times: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, times, 6, dtype=torch.float64)
    return x, torch.rand(batch, times) < 0.7


MASKS: dict[str, Callable[..., Any]] = {
    "causal": lambda kept, b, q, k: k <= q,
    "window": lambda kept, b, q, k: (k <= q) & (k > q - 3),
    "padded": lambda kept, b, q, k: (k <= q) & kept.flatten().view(kept.shape)[b, k],
    "one number": lambda kept, b, q, k: q.new_ones((), dtype=torch.bool) & torch.where(q > 2, k <= q, k >= q).to(q.device),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_what_the_model_makes(name: str) -> None:
    torch.manual_seed(0)
    mode: Any = __import__("torch._dynamo._trace_wrapped_higher_order_op", fromlist=["x"]).TransformGetItemToIndex
    model = Masked(MASKS[name]).double().eval()
    with mode():  # without it torch.vmap itself takes no index
        gm = stp_fx.trace(model, drawn(2, 5))
        assert provenance_of(gm).frontend == "fx"
        pruned = stp_fx.prune_graph(gm, ratio=0.5)
        for sizes in ((2, 5), (3, 7), (1, 4)):
            given = drawn(*sizes)
            torch.testing.assert_close(gm(*given), model(*given), rtol=1e-12, atol=1e-12)
            assert pruned(*given).shape == (*sizes, 6)


REFUSED: dict[str, Callable[..., Any]] = {
    "adds all up": lambda kept, b, q, k: k.sum() <= q,
    "runs along": lambda kept, b, q, k: k.reshape(-1).cumsum(0)[0] <= q,
    "a row for each": lambda kept, b, q, k: kept.long().index_select(0, b.reshape(-1)).sum() + k <= q,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_mix_elements_is_refused(name: str) -> None:
    model = Masked(REFUSED[name]).double().eval()
    with pytest.raises(TraceError, match=r"maps a function that calls aten\..* with torch\.vmap, at .*test_vmapped\.py"):
        stp_fx.trace(model, drawn(2, 5), frontend="fx", validate=False)


class Ensemble(nn.Module):
    """The functional form: a layer for each member, with weights that lie in one tensor."""

    def __init__(self, over: str) -> None:
        super().__init__()
        self.a, self.weight, self.over = nn.Linear(6, 8), nn.Parameter(torch.randn(4, 8, 8)), over
        self.b = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if self.over == "members":
            y = torch.vmap(lambda weight: torch.relu(y @ weight.cumsum(0)))(self.weight).sum(0)
        elif self.over == "last":
            member: Any = lambda weight, z: torch.relu(z[:, :4] @ weight[:, :1])  # noqa: E731
            y = torch.vmap(member, in_dims=(2, None), out_dims=1)(self.weight, y).squeeze(-1)
        else:
            y = torch.vmap(lambda row: row / row.norm())(y)
        return self.b(y)


@pytest.mark.parametrize("over", ["members", "last"])
def test_over_slices_it_is_a_loop(over: str) -> None:
    torch.manual_seed(0)
    model, x = Ensemble(over).double().eval(), torch.randn(5, 6, dtype=torch.float64)
    gm = stp_fx.trace(model, x[:2], frontend="fx")
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-12)
    pruned = stp_fx.prune_graph(gm, ratio=0.5)
    assert pruned(x).shape == model(x).shape


def test_over_the_batch_it_holds_for_the_example_alone() -> None:
    gm = stp_fx.trace(Ensemble("batch").eval(), torch.randn(2, 6), frontend="fx")
    with pytest.raises(AssertionError, match="traced for another shape"):
        gm(torch.randn(3, 6))
