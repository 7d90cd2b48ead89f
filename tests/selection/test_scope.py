from __future__ import annotations

import numpy as np
import pytest
import torch

from stp_fx.errors import InputError
from stp_fx.selection import local_fraction, order_units


def test_local_keys_are_ranks_over_size(make_groups):
    groups = make_groups([4, 2])
    order = order_units(groups, [torch.tensor([3.0, 1.0, 1.0, 2.0]), np.array([5.0, 4.0])])
    assert order.rank.tolist() == [3, 0, 1, 2, 1, 0]
    assert order.key.tolist() == [1.0, 0.25, 0.5, 0.75, 1.0, 0.5]
    assert order.owner.tolist() == [0, 0, 0, 0, 1, 1]
    assert order.unit.tolist() == [*groups[0].units, *groups[1].units]
    assert order.sequence().tolist() == [1, 2, 5, 3, 0, 4]


def test_exponents_are_the_share_of_the_product(make_groups):
    groups = make_groups([4, 2])
    order = order_units(groups, [np.arange(4.0), np.arange(2.0)], exponents={10: 2, 11: 3})
    np.testing.assert_allclose(order.key, [1 - 0.75**2, 0.75, 1 - 0.25**2, 1.0, 1 - 0.5**3, 1.0])


def test_a_local_amount_takes_the_units_whose_key_it_reaches(make_groups):
    sizes = [7, 12, 1, 64]
    groups = make_groups(sizes)
    rng = np.random.default_rng(3)
    order = order_units(groups, [rng.random(n) for n in sizes], exponents={11: 2, 13: 3})
    for amount in (0.0, 0.1, 0.5, 0.9):
        for place, (size, exponent) in enumerate(zip(sizes, [1, 2, 1, 3], strict=True)):
            taken = order.rank[(order.owner == place) & (order.key <= amount + 1e-12)]
            count = int(np.floor(local_fraction(amount, exponent) * size + 1e-9))
            assert sorted(taken.tolist()) == list(range(count))


def test_global_keys_are_the_scores(make_groups):
    order = order_units(make_groups([2, 3]), [np.array([0.5, 0.1]), np.array([0.3, 0.2, 0.5])], scope="global")
    assert order.key.tolist() == [0.5, 0.1, 0.3, 0.2, 0.5]
    assert order.sequence().tolist() == [1, 3, 2, 0, 4]


def test_local_fraction():
    assert local_fraction(0.3, 1) == 0.3
    assert local_fraction(0.0, 5) == 0.0
    for exponent in (2, 3, 4):
        assert (1 - local_fraction(0.6, exponent)) ** exponent == pytest.approx(0.4)


def test_bad_scores(make_groups):
    groups = make_groups([2])
    with pytest.raises(InputError, match=r"group 'g0' have shape \(3,\); expected \(2,\)"):
        order_units(groups, [np.zeros(3)])
    with pytest.raises(InputError, match="group 'g0' are not all finite"):
        order_units(groups, [np.array([1.0, np.nan])])
    with pytest.raises(InputError, match="unknown scope 'worldwide'; known: local, global"):
        order_units(groups, [np.zeros(2)], scope="worldwide")


def test_no_groups():
    order = order_units([], [])
    assert order.unit.size == order.sequence().size == order.sizes.size == 0
