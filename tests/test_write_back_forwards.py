"""Other forwards of a class, which exporters put in the place of ``forward``: what they read fits the smaller tensors too."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stp_fx
from stp_fx.writeback.check import agree_in_double

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Halves(nn.Module):
    """``chunk`` needs no number, ``split`` does; ``forward_joined`` is another function, ``forward_with`` takes more."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.inner, self.seed = nn.Conv2d(width, 2 * inner, 1), inner, inner
        self.layers = nn.ModuleList(nn.Conv2d(inner, inner, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(4 * inner, width, 1)

    def _rest(self, parts: list[Tensor]) -> Tensor:
        parts.extend(layer(parts[-1]) for layer in self.layers)
        return self.last(torch.cat(parts, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._rest(list(self.first(x).chunk(2, 1)))

    def forward_split(self, x: Tensor) -> Tensor:
        return self._rest(list(self.first(x).split((self.inner, self.inner), 1)))

    def forward_joined(self, x: Tensor) -> Tensor:
        return self.first(x)

    def forward_with(self, x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("takes what the forward does not get")


class Net(nn.Module):
    def __init__(self, inner: tuple[int, ...] = (8, 16)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Halves(8, width) for width in inner)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def smaller(model: nn.Module, **options: Any) -> Any:
    return stp_fx.write_back(stp_fx.prune_graph(stp_fx.trace(model, X), "magnitude", 0.5, **options), model)


@pytest.mark.parametrize("options", [{}, {"uniform": True}, {"ratios": {"blocks.0": 0.25}}], ids=["local", "uniform", "ratios"])
def test_a_number_that_only_another_forward_reads(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    result = smaller(model, **options)
    assert [b.inner for b in result.blocks] == [b.layers[0].in_channels for b in result.blocks] != [8, 16]
    assert [b.seed for b in result.blocks] == [8, 16], "no forward reads it"
    assert [b.inner for b in model.blocks] == [8, 16]
    with torch.no_grad():
        for block in result.blocks:
            x = torch.randn(3, block.first.in_channels, 9, 9)
            torch.testing.assert_close(block.forward_split(x), block(x))


def test_what_another_forward_cannot_express_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Two halves of different sizes have no one number; ``forward`` itself can do it, in a class that takes them from tensors."""

    class Uneven(Halves):
        def forward(self, x: Tensor) -> Tensor:
            sizes = self.layers[0].weight.shape[1]
            found = self.first(x)
            return self._rest([found[:, : found.shape[1] - sizes], found[:, found.shape[1] - sizes :]])

    torch.manual_seed(0)
    model = Net((8,)).eval()
    model.blocks[0] = Uneven(8, 8).eval()
    gm = stp_fx.trace(model, X)
    pruned = stp_fx.apply_plan(gm, stp_fx.analyze(gm).plan_for({"blocks.0.first": [0, 1, 8]}))
    with caplog.at_level(logging.INFO):
        result: Any = stp_fx.write_back(pruned, model)
    assert result.blocks[0].first.out_channels == 13
    assert "another forward is not: Net cannot express what is left of it. forward_split" in caplog.text
    assert result.blocks[0].inner == 8


class Picks(nn.Module):
    """The tokens of the highest scores; those differ by little more than rounding, as before a head has learnt."""

    backwards = False

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.weights = nn.Parameter(1e-4 * torch.randn(1, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.down(self.up(x).relu())
        terms = (y * self.weights + 30).unbind(-1)
        best = sum(terms[::-1] if self.backwards else terms).topk(8, 1).indices
        return y.gather(1, best.unsqueeze(-1).expand(-1, -1, y.shape[-1]))


def test_scores_that_rounding_puts_in_another_order() -> None:
    torch.manual_seed(0)
    model, x = Picks().eval(), torch.randn(2, 40, 16)
    pruned = stp_fx.prune_graph(stp_fx.trace(model, x), "magnitude", 0.5)
    model.backwards = True  # the same sums in another order, as where a layer is lowered
    small: Any = stp_fx.write_back(pruned, model, x)
    assert small.up.out_features == 16
    assert (small(x) - pruned(x)).abs().max() > 0.1, "rounding decides nothing here"
    torch.testing.assert_close(small.double()(x.double()), pruned.double()(x.double()))


def test_other_numbers_are_no_rounding() -> None:
    torch.manual_seed(0)
    model, x = Picks().eval(), torch.randn(2, 40, 16)
    pruned = stp_fx.prune_graph(stp_fx.trace(model, x), "magnitude", 0.5)
    small: Any = stp_fx.write_back(pruned, model, x)
    assert agree_in_double(pruned, small, {"x": x}, {"x": x})
    small.up.weight.data[0, 0] += 1e-2
    assert not agree_in_double(pruned, small, {"x": x}, {"x": x})
    assert not agree_in_double(pruned.double(), small.double(), {"x": x.double()}, {"x": x.double()}), "that was compared before"
