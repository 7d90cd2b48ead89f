"""Elements: the integers behind the analysis. Which positions are one, which split into products, which are pinned.

Nothing is solved here; facts are recorded as arrays while the graph runs, and ``solve`` draws the conclusions once.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from stp_fx.rules import FIXED, Dim, Dims, Factor, dim_size, fixed_dim, fixed_dims, has_ids

__all__ = ["Elements", "Exclusion", "Note", "ProductRecord"]


@dataclasses.dataclass(frozen=True, eq=False)
class ProductRecord:
    """``ids[i, j, ..]`` survives if and only if ``factors[0][i]``, ``factors[1][j]``, .. all do."""

    ids: np.ndarray
    factors: tuple[np.ndarray, ...]
    node: str


@dataclasses.dataclass(frozen=True, eq=False)
class Note:
    """Something said of elements: why they are pinned, or why removing them is not masking them."""

    ids: np.ndarray
    reason: str
    node: str


@dataclasses.dataclass(frozen=True, eq=False)
class Exclusion:
    """``node`` takes no notice of positions that read ``value`` along dimension ``dim`` of its first operand.

    ``least``: how many positions it chooses; 0 if it chooses none (a softmax).
    """

    ids: np.ndarray
    node: str
    dim: int
    value: float
    least: int
    reason: str


class Elements:
    """Records unions, products, pins and notes. ``node`` names the graph node at hand, for reasons."""

    def __init__(self) -> None:
        self.count: int = 1
        self.unions: list[tuple[np.ndarray, np.ndarray]] = []
        self.products: list[ProductRecord] = []
        self.pins: list[Note] = []
        self.notes: list[Note] = []
        self.parts: list[np.ndarray] = []
        self.exclusions: list[Exclusion] = []
        self.node = ""
        self._starts = [0]
        self._splits: dict[tuple[bytes, tuple[int, ...]], tuple[np.ndarray, ...]] = {}
        self._by_factors: dict[tuple[int, ...], tuple[ProductRecord, tuple[int, ...]]] = {}

    def allocate(self, size: int) -> np.ndarray:
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self._starts.append(self.count)
        self.count += size
        ids.flags.writeable = False
        return ids

    def new_dim(self, size: int) -> Dim:
        return () if size == 1 else (Factor(size, self.allocate(size)),)

    def pin(self, dim: Dim, reason: str) -> None:
        self.pins.extend(Note(factor.ids, reason, self.node) for factor in dim if factor.ids is not None)

    def several(self, dim: Dim, least: int) -> None:
        """At least so many positions of ``dim`` stay: its positions in as many parts, of which none may go whole."""
        for factor in dim:
            if factor.ids is not None and len(dim) == 1:
                self.parts += np.array_split(factor.ids, min(least, len(factor.ids)))

    def inexact(self, dim: Dim, reason: str) -> None:
        self.notes.extend(Note(factor.ids, reason, self.node) for factor in dim if factor.ids is not None)

    # -- joining ---------------------------------------------------------------------------------------------------

    def unify(self, first: Dim, second: Dim) -> Dim:
        """Positions of both are kept or removed together. Returns the finer list of factors of the two."""
        if first is second or not (has_ids(first) or has_ids(second)):
            return first
        if len(first) == 1 and len(second) == 1:
            return (self._join(first[0], second[0]),)
        result: list[Factor] = []
        for a, b in _aligned(first, second):
            if len(a) == 1 and len(b) == 1:
                result.append(self._join(a[0], b[0]))
            elif len(a) == 1:
                result.extend(self._join_list(a[0], b))
            elif len(b) == 1:
                result.extend(self._join_list(b[0], a))
            else:
                result.append(self._join(Factor(dim_size(a), self.flat(a)), Factor(dim_size(b), self.flat(b))))
        return tuple(result)

    def _join(self, first: Factor, second: Factor) -> Factor:
        if first.ids is second.ids:
            return first
        if first.ids is None or second.ids is None:
            self.pin((first, second), "meets positions that cannot be removed (graph inputs, spatial or sequence positions)")
            return Factor(first.size, None)
        a, b = first.ids, second.ids
        mixed = (a == FIXED) | (b == FIXED)
        if mixed.any():
            held = np.concatenate([a[mixed], b[mixed]])
            self.pin((Factor(len(held), held),), "meets positions that cannot be removed")
            self.unions.append((a[~mixed], b[~mixed]))
            return Factor(first.size, np.where(mixed, FIXED, a))
        self.unions.append((a, b))
        return first

    def _join_list(self, single: Factor, factors: Dim) -> Dim:
        if single.ids is None or not has_ids(factors):
            self.pin((single, *factors), "meets positions that cannot be removed (graph inputs, spatial or sequence positions)")
            return tuple(Factor(f.size, None) for f in factors)
        self._join(single, Factor(single.size, self.flat(factors)))
        return factors

    # -- products --------------------------------------------------------------------------------------------------

    def _add_product(self, ids: np.ndarray, factors: tuple[np.ndarray, ...]) -> ProductRecord:
        record = ProductRecord(ids, factors, self.node)
        self.products.append(record)
        starts = [int(f[0]) for f in factors]
        if all(self._start_of(f) == s and len(f) == self._length_at(s) for s, f in zip(starts, factors, strict=True)):
            order = tuple(int(k) for k in np.argsort(starts))
            self._by_factors.setdefault(tuple(starts[k] for k in order), (record, order))
        return record

    def _start_of(self, ids: np.ndarray) -> int | None:
        start = self._starts[bisect.bisect_right(self._starts, int(ids[0])) - 1]
        stop = start + self._length_at(start)
        return start if int(ids.min()) >= start and int(ids.max()) < stop else None

    def _length_at(self, start: int) -> int:
        k = bisect.bisect_right(self._starts, start)
        return (self._starts[k] if k < len(self._starts) else self.count) - start

    def flat(self, dim: Dim) -> np.ndarray:
        """One id per position of the whole dimension; several moving factors become derived elements."""
        moving = [f.ids for f in dim if f.ids is not None]
        if not moving:
            return np.full(dim_size(dim), FIXED, dtype=np.int64)
        if len(dim) == 1:
            return moving[0]
        table = moving[0] if len(moving) == 1 else self._derived(moving)
        for k, factor in enumerate(dim):
            if factor.ids is None:
                table = np.repeat(np.expand_dims(table, k), factor.size, axis=k)
        return table.reshape(-1)

    def _derived(self, factors: list[np.ndarray]) -> np.ndarray:
        """The elements that survive if all given factors do: the ones that a split was made of, else new ones."""
        starts = [self._start_of(f) for f in factors]
        if None not in starts and len(set(starts)) == len(starts):
            order = [int(k) for k in np.argsort(starts)]  # type: ignore[arg-type]
            known = self._by_factors.get(tuple(starts[k] for k in order))  # type: ignore[misc]
            if known is not None:
                record, recorded = known
                axis_of = {start: recorded[k] for k, start in enumerate(starts[j] for j in order)}
                table = record.ids.transpose([axis_of[s] for s in starts])
                return table[np.ix_(*[f - s for f, s in zip(factors, starts, strict=True)])]  # type: ignore[operator]
        ids = self.allocate(math.prod(len(f) for f in factors)).reshape([len(f) for f in factors])
        self._add_product(ids, tuple(factors))
        return ids

    def split(self, factor: Factor, sizes: Sequence[int], pinned: str | None) -> list[Dim]:
        """Cuts a factor into ``sizes``, outer to inner. Constant along a side: that side is fixed; else a product."""
        if factor.ids is None or sum(size > 1 for size in sizes) < 2:
            return [() if size == 1 else (factor if size == factor.size else Factor(size, None),) for size in sizes]
        table = factor.ids.reshape(list(sizes))
        moving = [k for k, size in enumerate(sizes) if size > 1 and (table != np.take(table, [0], axis=k)).any()]
        still = tuple(k for k in range(len(sizes)) if k not in moving)
        reduced = table[tuple(0 if k in still else slice(None) for k in range(len(sizes)))]
        if len(moving) > 1 and (factor.ids == FIXED).any():
            self.pin((factor,), "a reshape cuts across positions of which some cannot be removed")
            return list(fixed_dims(sizes))
        if len(moving) == 1:
            parts: tuple[np.ndarray, ...] = (reduced,)
        else:
            parts = self._factors_of(reduced)
            if pinned:
                self.pin(tuple(Factor(len(p), p) for p in parts), pinned)
        ids = dict(zip(moving, parts, strict=False)) if moving else {}
        return [() if size == 1 else (Factor(size, ids.get(k)),) for k, size in enumerate(sizes)]

    def _factors_of(self, table: np.ndarray) -> tuple[np.ndarray, ...]:
        table = np.ascontiguousarray(table)
        key = (table.tobytes(), table.shape)
        if key not in self._splits:
            factors = tuple(self.allocate(size) for size in table.shape)
            self._add_product(table, factors)
            self._splits[key] = factors
        return self._splits[key]

    # -- views -----------------------------------------------------------------------------------------------------

    def regroup(self, dims: Sequence[Dim], shape: Sequence[int], pinned: str | None = None) -> Dims:
        """``view``: cuts and merges factors at the boundaries of ``shape``."""
        if not any(has_ids(dim) for dim in dims):
            return fixed_dims(shape)
        result: list[Dim] = []
        for factors, sizes in _chunks([f for dim in dims for f in dim], list(shape)):
            result.extend(self._regroup_chunk(factors, sizes, pinned))
        return tuple(result)

    def _regroup_chunk(self, factors: list[Factor], sizes: list[int], pinned: str | None) -> list[Dim]:
        if not any(f.ids is not None for f in factors):
            return [fixed_dim(size) for size in sizes]
        if sum(size > 1 for size in sizes) == 1:
            return [tuple(factors) if size > 1 else () for size in sizes]
        cuts = _cuts([f.size for f in factors], sizes)
        if cuts is None:
            flat = Factor(math.prod(f.size for f in factors), self.flat(tuple(factors)))
            return self.split(flat, sizes, pinned)
        pieces = [piece for f, cut in zip(factors, cuts, strict=True) for dim in self.split(f, cut, pinned) for piece in dim]
        result, at = [], 0
        for size in sizes:
            take: list[Factor] = []
            while math.prod(f.size for f in take) < size:
                take.append(pieces[at])
                at += 1
            result.append(tuple(take))
        return result


def _aligned(first: Dim, second: Dim) -> list[tuple[Dim, Dim]]:
    """Runs of factors of both lists that cover the same positions, as short as possible."""
    result, i, j = [], 0, 0
    while i < len(first):
        a, b = [first[i]], [second[j]]
        i, j = i + 1, j + 1
        size_a, size_b = a[0].size, b[0].size
        while size_a != size_b:
            if size_a < size_b:
                a.append(first[i])
                size_a *= first[i].size
                i += 1
            else:
                b.append(second[j])
                size_b *= second[j].size
                j += 1
        result.append((tuple(a), tuple(b)))
    return result


def _chunks(factors: list[Factor], sizes: list[int]) -> list[tuple[list[Factor], list[int]]]:
    """Cuts both lists where their running products meet. Sizes of one go with the chunk before them."""
    result: list[tuple[list[Factor], list[int]]] = []
    at = 0
    group: list[int] = []
    for size in sizes:
        group.append(size)
        if math.prod(group) == 1:
            continue
        taken: list[Factor] = []
        probe = at
        while probe < len(factors) and math.prod(f.size for f in taken) < math.prod(group):
            taken.append(factors[probe])
            probe += 1
        if math.prod(f.size for f in taken) == math.prod(group):
            result.append((taken, group))
            at, group = probe, []
    if group and math.prod(group) == 1:
        if result:
            result[-1][1].extend(group)
        else:
            result.append(([], group))
    elif group:
        result.append((factors[at:], group))
    return result


def _cuts(factor_sizes: list[int], sizes: list[int]) -> list[list[int]] | None:
    """For each factor the sizes it is cut into so that ``sizes`` can be formed; ``None`` if boundaries cross."""
    wanted = [size for size in sizes if size > 1]
    cuts: list[list[int]] = []
    k, need = 0, wanted[0]
    for size in factor_sizes:
        cut: list[int] = []
        while size > 1:
            if need == 1:
                k += 1
                need = wanted[k]
            if need % size == 0:
                cut.append(size)
                need //= size
                size = 1
            elif size % need == 0:
                cut.append(need)
                size //= need
                need = 1
            else:
                return None
        cuts.append(cut)
    return cuts
