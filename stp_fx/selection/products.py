"""Which factor of a product is pruned: heads or head dimensions, conv groups or the channels inside each.

An index of a product axis survives if and only if all its factors survive, so pruning every factor by the ratio would
take more than the ratio from the axis. The factors that are pruned *carry* the product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from stp_fx.analysis.groups import Group, Product
from stp_fx.checks import is_choice, shown
from stp_fx.errors import InputError

__all__ = ["PRODUCT_OPTIONS", "carriers"]

PRODUCT_OPTIONS = ("auto", "outer", "inner", "both", "none")


@dataclasses.dataclass(frozen=True)
class _Factor:
    """One prunable factor of a product: its groups, and what "auto" ranks it by."""

    groups: tuple[int, ...]
    exact: bool
    units: int


def carriers(groups: Sequence[Group], products: Sequence[Product], option: str = "auto") -> dict[int, int]:
    """Map each group that is to be pruned to its exponent: how many factors share the pruning of its product axis.

    Keys are ``Group.index``; a group that is absent is left whole, because another factor carries its product. A group
    of no product has exponent 1. Groups missing from ``groups`` (ignored by the user) count as pinned; a factor without
    groups never carries, the others do in its place. A group of several products carries if any of them chose it; its
    exponent is the largest number of factors that carry one of its products.

    - "outer", "inner": the first, or the last, factor that can be pruned.
    - "both": all factors that can be pruned.
    - "none": no factor of any product is pruned.
    - "auto": the factor whose groups are all exact, then the one with most units (the finest, which meets a ratio most
      closely), then the outermost. Products with the fewest choices decide first, in order; a factor that carries
      already settles a product, and a factor that an earlier product passed over is taken only if nothing else is left.
    """
    if not is_choice(option, PRODUCT_OPTIONS):
        raise InputError(f"unknown products option {shown(option)}; known: {', '.join(PRODUCT_OPTIONS)}")
    known = {group.index: group for group in groups}
    factored = [factors for product in products if (factors := _prunable_factors(product, known))]
    member_of_product = {index for factors in factored for factor in factors for index in factor.groups}
    chosen = _auto(factored) if option == "auto" else _by_position(factored, option)
    exponents = {index: 1 for index in known if index not in member_of_product or index in chosen}
    for factors in factored:
        carrying = [factor for factor in factors if chosen.intersection(factor.groups)]
        for index in chosen.intersection(index for factor in carrying for index in factor.groups):
            exponents[index] = max(exponents[index], len(carrying))
    return exponents


def _prunable_factors(product: Product, known: dict[int, Group]) -> list[_Factor]:
    factors = []
    for indices in product.factors:
        present = tuple(dict.fromkeys(index for index in indices if index in known))
        if present:
            found = [known[index] for index in present]
            factors.append(_Factor(present, all(g.exact for g in found), sum(g.size for g in found)))
    return factors


def _by_position(factored: Iterable[list[_Factor]], option: str) -> set[int]:
    picked = {"outer": slice(0, 1), "inner": slice(-1, None), "both": slice(None), "none": slice(0, 0)}[option]
    return {index for factors in factored for factor in factors[picked] for index in factor.groups}


def _auto(factored: Sequence[list[_Factor]]) -> set[int]:
    chosen: set[int] = set()
    passed_over: set[int] = set()
    for factors in sorted(factored, key=len):  # stable: products with as many choices keep their order
        settled = [factor for factor in factors if chosen.issuperset(factor.groups)]
        if not settled:
            free = [factor for factor in factors if not passed_over.intersection(factor.groups)]
            # max keeps the first of equals: the outermost factor
            settled = [max(free or factors, key=lambda factor: (factor.exact, factor.units))]
            chosen.update(settled[0].groups)
        for factor in factors:
            if factor not in settled:
                passed_over.update(factor.groups)
    return chosen
