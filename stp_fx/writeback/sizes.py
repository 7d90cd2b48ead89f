"""The new value of a number: the sizes that a plan changed, and the numbers that can stand for them."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from torch import nn

from stp_fx.analysis.plan import PrunePlan
from stp_fx.writeback.tensors import tensors_of

__all__ = ["KINDS", "Sizes"]

KINDS = ("whole", "outer", "inner", "middle")
"""How a number can describe an axis: its length, or the outer, inner or a middle factor of it (768 = 3 x 12 x 64)."""


class Sizes:
    """The axes that a plan shortened, under every name that their tensors have in the model."""

    def __init__(self, plan: PrunePlan, model: nn.Module) -> None:
        tensors = tensors_of(model)
        tied: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            tied.setdefault(id(tensor), []).append(name)
        self._axes: dict[str, list[np.ndarray]] = {}
        for (name, dim), kept in plan.kept.items():
            mask = np.zeros(plan.sizes[name, dim], dtype=bool)
            mask[kept] = True
            for alias in tied[id(tensors[name])] if name in tensors else [name]:
                self._axes.setdefault(alias, []).append(mask)
        self._known: dict[tuple[int, tuple[str, ...]], dict[str, list[int]]] = {}

    def what_became(self, number: int, places: Iterable[str]) -> dict[str, list[int]]:
        """New values of ``number``, by how it describes an axis below one of ``places`` (module names); likely ones first.

        A factor has a new value where the kept indices are a product of kept factors; the old value is among the results
        where another factor was shortened.
        """
        key = (number, tuple(places))
        if key not in self._known:
            found = {kind: Counter[int]() for kind in KINDS}
            for mask in self._below(key[1]):
                for kind, new in _factors(mask, number):
                    found[kind][new] += 1
            self._known[key] = {kind: [new for new, _ in counts.most_common(3)] for kind, counts in found.items() if counts}
        return self._known[key]

    def split_by(self, numbers: tuple[int, ...], places: Iterable[str]) -> tuple[int, ...] | None:
        """The new sizes of all factors of an axis below one of ``places``; None if there is none that they split."""
        for mask in self._below(tuple(places)):
            if len(mask) != math.prod(numbers):
                continue
            cube, every = mask.reshape(numbers), range(len(numbers))
            along = [np.any(cube, axis=tuple(j for j in every if j != k)) for k in every]
            if np.array_equal(cube, functools.reduce(np.multiply.outer, along)):
                return tuple(int(kept.sum()) for kept in along)
        return None

    def new_sizes(self) -> list[int]:
        """Every length that a shortened axis has now, the most frequent first."""
        counts = Counter(int(mask.sum()) for masks in self._axes.values() for mask in masks)
        return [size for size, _ in counts.most_common()]

    def _below(self, places: tuple[str, ...]) -> Iterator[np.ndarray]:
        seen: set[bytes] = set()
        for name, masks in self._axes.items():
            if any(not place or name.startswith(f"{place}.") for place in places):
                for mask in masks:
                    if mask.tobytes() not in seen:
                        seen.add(mask.tobytes())
                        yield mask


def _factors(mask: np.ndarray, number: int) -> Iterator[tuple[str, int]]:
    size = len(mask)
    if number < 2 or size % number:
        return
    rest = size // number
    for before in (n for n in range(1, rest + 1) if rest % n == 0):
        after = rest // before
        cube = mask.reshape(before, number, after)
        along, across = np.any(cube, axis=(0, 2)), np.any(cube, axis=1)
        if np.array_equal(cube, across[:, None, :] & along[None, :, None]):
            kind = "whole" if rest == 1 else "outer" if before == 1 else "inner" if after == 1 else "middle"
            yield kind, int(along.sum())
