from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stp_fx
from stp_fx.analysis.groups import Product
from stp_fx.errors import InputError
from stp_fx.selection import carriers


def product(*factors: tuple[int, ...]) -> Product:
    return Product("axis", tuple(4 for _ in factors), factors)


def test_without_products_all_carry(make_groups):
    for option in ("auto", "outer", "inner", "both", "none"):
        assert carriers(make_groups([3, 4]), [], option) == {10: 1, 11: 1}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("outer", {10: 1, 12: 1}),
        ("inner", {11: 1, 12: 1}),
        ("both", {10: 2, 11: 2, 12: 1}),
        ("none", {12: 1}),
        ("auto", {11: 1, 12: 1}),  # 64 head dimensions are finer than 12 heads
    ],
)
def test_heads_and_head_dimensions(make_groups, option, expected):
    groups = make_groups([12, 64, 8])
    assert carriers(groups, [product((10,), (11,))], option) == expected


@pytest.mark.parametrize("option", ["auto", "outer", "inner", "both"])
def test_a_pinned_factor_leaves_the_product_to_the_others(make_groups, option):
    groups = make_groups([12, 64])
    assert carriers(groups, [product((), (11,))], option) == {10: 1, 11: 1}
    assert carriers(groups[:1], [product((10,), (11,))], option) == {10: 1}  # group 11 is ignored
    assert carriers(groups, [product((), ())], option) == {10: 1, 11: 1}


def test_auto_prefers_exact_then_fine_then_outer(make_groups):
    products = [product((10,), (11,))]
    assert carriers(make_groups([12, 64], exact=[True, False]), products) == {10: 1}
    assert carriers(make_groups([12, 64], exact=[False, False]), products) == {11: 1}
    assert carriers(make_groups([16, 16]), products) == {10: 1}
    assert carriers(make_groups([5, 4, 8]), [product((10, 11), (12,))]) == {10: 1, 11: 1}


def test_three_factors(make_groups):
    groups = make_groups([2, 3, 4])
    products = [product((10,), (11,), (12,))]
    assert carriers(groups, products, "both") == {10: 3, 11: 3, 12: 3}
    assert carriers(groups, products, "inner") == {12: 1}
    assert carriers(groups, [product((10,), (), (12,))], "both") == {10: 2, 11: 1, 12: 2}
    assert carriers(groups[:2], products, "both") == {10: 2, 11: 2}


def test_auto_lets_one_factor_carry_several_products(make_groups):
    groups = make_groups([4, 8, 16])
    # 11 is finer than 10, and carries already when its product with 12 is looked at
    assert carriers(groups, [product((10,), (11,)), product((11,), (12,))]) == {11: 1}
    # the product with one choice decides first, although it comes last
    assert carriers(groups, [product((10,), (11,)), product((10,), ())]) == {10: 1, 12: 1}
    # 11 was passed over by the first product: 10 is taken rather than 11 although 11 is finer
    assert carriers(groups, [product((12,), (11,)), product((10,), (11,))]) == {12: 1, 10: 1}


def test_auto_when_both_factors_have_to_carry(make_groups):
    groups = make_groups([4, 8])
    products = [product((10,), (11,)), product((10,), ()), product((), (11,))]
    assert carriers(groups, products) == {10: 2, 11: 2}


def test_a_group_chosen_by_any_product_carries_and_shares(make_groups):
    groups = make_groups([4, 8, 2])
    # outer of the second product is inner of the first: the first is pruned by two factors
    assert carriers(groups, [product((10,), (11,)), product((11,), (12,))], "outer") == {10: 2, 11: 2}


def test_the_same_answer_every_time_and_unknown_options(make_groups):
    groups = make_groups([3, 5, 7, 9])
    products = [product((10,), (11,)), product((12,), (13,)), product((11,), (12,))]
    assert len({tuple(sorted(carriers(groups, products).items())) for _ in range(5)}) == 1
    with pytest.raises(InputError, match="unknown products option 'heads'; known: auto, outer, inner, both, none"):
        carriers(groups, products, "heads")


def test_a_factor_that_is_a_product_counts_as_its_factors():
    """Query heads are key/value heads x the queries of each: "outer" takes the former and leaves head dimensions whole."""

    class GroupedQueries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(a, b) for a, b in ((8, 48), (8, 16), (8, 16), (48, 3)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, t, _ = x.shape
            q, k, v = (f(x).view(n, t, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            k, v = (y[:, :, None].expand(n, 2, 3, t, 8).reshape(n, 6, t, 8) for y in (k, v))
            q = torch.cat([-q[..., 4:], q[..., :4]], -1) + q
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    gm = stp_fx.trace(GroupedQueries(), torch.randn(2, 5, 8))
    assert all(factors[0] for factors in (p.factors for p in stp_fx.analyze(gm).products))
    pruned = stp_fx.prune_graph(gm, products="outer")
    sizes = {name: list(p.shape) for name, p in pruned.named_parameters() if name.endswith("weight")}
    assert sizes == {"q.weight": [24, 8], "k.weight": [8, 8], "v.weight": [8, 8], "out.weight": [3, 24]}
    kept = stp_fx.plan_of(pruned).kept["q.weight", 0]
    assert kept.reshape(3, 8)[:, 0].tolist() in ([0, 8, 16], [24, 32, 40])


def test_a_factor_that_is_a_product_itself_is_taken_apart():
    """8 channels in groups of one, doubled twice: the 8 carry all of it, and half of them go."""
    convs = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1, groups=8), nn.Conv2d(16, 32, 1, groups=16), nn.Conv2d(32, 3, 1)]
    gm = stp_fx.trace(nn.Sequential(*convs), torch.randn(1, 3, 4, 4))
    graph = stp_fx.analyze(gm)
    assert sorted(p.sizes for p in graph.products) == [(8, 2), (8, 2, 2)]
    assert all(len(factor) == 1 for p in graph.products for factor in p.factors)
    widths = [module.out_channels for module in stp_fx.prune_graph(gm, ratio=0.5).children()]
    assert widths == [4, 8, 16, 3]
