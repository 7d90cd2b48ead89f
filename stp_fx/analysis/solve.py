"""Draws the conclusions: which elements are one, which follow from factors, which are pinned.

Union-find over element arrays is scipy's connected components. Products that split one axis unify factor by factor; where
their cuts differ they are refined, or pinned with the reason. Pinned spreads from a product to its factors.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from stp_fx.analysis.elements import Elements, Note, ProductRecord
from stp_fx.rules import FIXED

__all__ = ["Solution", "SolvedProduct", "solve"]

_INCOMPATIBLE = "split in two ways that do not fit together"


@dataclasses.dataclass(frozen=True, eq=False)
class SolvedProduct:
    """A product over classes: ``classes[i, j]`` survives iff ``factors[0][i]`` and ``factors[1][j]`` do."""

    classes: np.ndarray
    factors: tuple[np.ndarray, ...]
    node: str


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """``label[element]`` is the element's class; ``pinned`` and ``derived`` say what holds of a class.

    ``products`` are ordered so that a product's factors come before it; evaluating them in order settles every class.
    """

    label: np.ndarray
    count: int
    pinned: np.ndarray
    derived: np.ndarray
    products: tuple[SolvedProduct, ...]


def solve(elements: Elements) -> Solution:
    """Solves what a run recorded; may add unions, products and pins to ``elements`` on the way."""
    elements.pins.append(Note(np.array([FIXED]), "fixed", ""))
    settled: set[tuple[int, int]] = set()
    while True:
        label, count = _components(elements)
        products = [_labelled(record, label) for record in elements.products]
        if not _match_products(elements, products, settled):
            break
    pinned = np.zeros(count, dtype=bool)
    for note in elements.pins:
        pinned[label[note.ids.ravel()]] = True
    ordered = _ordered(elements, products, pinned, label)
    for product in reversed(ordered):
        _pin_factors(product, pinned)
    derived = np.zeros(count, dtype=bool)
    for product in ordered:
        derived[product.classes.ravel()] = True
    return Solution(label, count, pinned, derived, tuple(ordered))


def _components(elements: Elements) -> tuple[np.ndarray, int]:
    # imported here: scipy's sparse graphs take a fifth of the time in which stp_fx is imported
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not elements.unions:
        return np.arange(elements.count), elements.count
    # older versions of scipy find components of a graph with 32-bit indices only, and newer ones make it one
    rows, cols = (np.concatenate([np.ravel(each[k]) for each in elements.unions]).astype(np.int32) for k in (0, 1))
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, cols)), shape=(elements.count, elements.count))
    count, label = connected_components(graph, directed=False)
    return label.astype(np.int64), int(count)


def _labelled(record: ProductRecord, label: np.ndarray) -> SolvedProduct:
    return SolvedProduct(label[record.ids], tuple(label[f] for f in record.factors), record.node)


def _match_products(elements: Elements, products: list[SolvedProduct], settled: set[tuple[int, int]]) -> bool:
    """Unifies the factors of products that share classes; ``True`` if anything new was found."""
    if not products:
        return False
    owner = np.concatenate([np.full(p.classes.size, k) for k, p in enumerate(products)])
    row = np.concatenate([np.arange(p.classes.size) for p in products])
    klass = np.concatenate([p.classes.ravel() for p in products])
    order = np.lexsort((row, owner, klass))
    owner, row, klass = owner[order], row[order], klass[order]
    same = klass[1:] == klass[:-1]
    first, second = owner[:-1][same], owner[1:][same]
    left, right = row[:-1][same], row[1:][same]
    order = np.lexsort((second, first))
    first, second, left, right = first[order], second[order], left[order], right[order]
    starts = np.flatnonzero(np.r_[True, (np.diff(first) != 0) | (np.diff(second) != 0)])[: len(first)]
    changed = False
    for start, stop in itertools.pairwise([*starts.tolist(), len(first)]):
        pair = (int(first[start]), int(second[start]))
        changed |= _match_pair(elements, products, pair, left[start:stop], right[start:stop], settled)
    return changed


def _match_pair(
    elements: Elements,
    products: list[SolvedProduct],
    pair: tuple[int, int],
    left: np.ndarray,
    right: np.ndarray,
    settled: set[tuple[int, int]],
) -> bool:
    p, q = products[pair[0]], products[pair[1]]
    if pair in settled:
        return False
    a = [f[i] for f, i in zip(p.factors, np.unravel_index(left, p.classes.shape), strict=True)]
    b = [f[i] for f, i in zip(q.factors, np.unravel_index(right, q.classes.shape), strict=True)]
    if len(a) == len(b):
        for permutation in itertools.permutations(range(len(b))):
            matched = [(x, b[k]) for x, k in zip(a, permutation, strict=True)]
            if pair[0] == pair[1] or all(_one_to_one(x, y) for x, y in matched):
                return _unify_labels(elements, matched, p, q, permutation, left, right, pair)
    settled.add(pair)
    if _refine(elements, pair, p, q):
        return True
    for k, rows in ((pair[0], left), (pair[1], right)):
        record = elements.products[k]
        elements.pins.append(Note(record.ids.ravel()[rows], f"{_INCOMPATIBLE}: at {p.node} and at {q.node}", record.node))
    return False


def _unify_labels(
    elements: Elements,
    matched: list[tuple[np.ndarray, np.ndarray]],
    p: SolvedProduct,
    q: SolvedProduct,
    permutation: tuple[int, ...],
    left: np.ndarray,
    right: np.ndarray,
    pair: tuple[int, int],
) -> bool:
    changed = False
    at_p, at_q = np.unravel_index(left, p.classes.shape), np.unravel_index(right, q.classes.shape)
    for k, (x, y) in enumerate(matched):
        differs = x != y
        if differs.any():
            first = elements.products[pair[0]].factors[k][at_p[k][differs]]
            second = elements.products[pair[1]].factors[permutation[k]][at_q[permutation[k]][differs]]
            elements.unions.append((first, second))
            changed = True
    return changed


def _one_to_one(x: np.ndarray, y: np.ndarray) -> bool:
    pairs = len(np.unique(np.stack([x, y], axis=1), axis=0))
    return pairs == len(np.unique(x)) == len(np.unique(y))


def _refine(elements: Elements, pair: tuple[int, int], p: SolvedProduct, q: SolvedProduct) -> bool:
    """Two cuts of one whole axis, 12 x 64 and 24 x 32: both become 12 x 2 x 32."""
    if p.classes.size != q.classes.size or not np.array_equal(p.classes.ravel(), q.classes.ravel()):
        return False
    p_shape, q_shape = p.classes.shape, q.classes.shape
    strides = sorted({math.prod(s[k:]) for s in (p_shape, q_shape) for k in range(len(s) + 1)}, reverse=True)
    if any(a % b for a, b in itertools.pairwise(strides)):
        return False
    sizes = [a // b for a, b in itertools.pairwise(strides)]
    if (len(sizes),) in ((len(p_shape),), (len(q_shape),)) and len(p_shape) == len(q_shape):
        return False
    fine = [elements.allocate(size) for size in sizes]
    for k in pair:
        record, at = elements.products[k], 0
        for factor in record.factors:
            inside: list[np.ndarray] = []
            while math.prod(len(f) for f in inside) < len(factor):
                inside.append(fine[at])
                at += 1
            if len(inside) == 1:
                elements.unions.append((factor, inside[0]))
            else:
                elements.products.append(ProductRecord(factor.reshape([len(f) for f in inside]), tuple(inside), record.node))
    return True


def _ordered(elements: Elements, products: list[SolvedProduct], pinned: np.ndarray, label: np.ndarray) -> list[SolvedProduct]:
    """Factors first. Products that would be their own factor are pinned and left out."""
    limit = min(len(products), 32)  # no chain of products is longer; the depth of a product inside itself grows in every round
    depth = np.zeros(len(pinned), dtype=np.int64)
    for _ in range(len(products) + 1):
        before = depth.copy()
        for product in products:
            inside = 1 + max(int(depth[f].max()) for f in product.factors)
            np.maximum.at(depth, product.classes.ravel(), inside)
        if np.array_equal(before, depth):
            return sorted(products, key=lambda p: int(depth[p.classes.ravel()].max()))
        if depth.max() > 64:
            break
    for product in products:
        if int(depth[product.classes.ravel()].max()) > limit:
            pinned[product.classes.ravel()] = True
            for factor in product.factors:
                pinned[factor] = True
            elements.pins.append(Note(np.flatnonzero(np.isin(label, product.classes)), "an axis split into itself", product.node))
    return [p for p in products if int(depth[p.classes.ravel()].max()) <= limit]


def _pin_factors(product: SolvedProduct, pinned: np.ndarray) -> None:
    held = pinned[product.classes]
    if held.any():
        for factor, where in zip(product.factors, np.nonzero(held), strict=True):
            pinned[factor[where]] = True
