"""PrunePlan: the kept positions of every shortened axis, and the removed blocks. The plain data that rewrites need."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import cast

import numpy as np
import numpy.typing as npt

from stp_fx.analysis.plan_json import decode_plan, encode_plan
from stp_fx.checks import is_a, is_whole, shown
from stp_fx.errors import InputError, PlanError
from stp_fx.text import html_table

__all__ = ["PrunePlan"]

AxisKey = tuple[str, int]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PrunePlan:
    """Which indices stay, for every axis that a plan shortens, and which blocks are removed.

    ``kept[name, dim]``: original indices that stay, int64, ascending (any sequence of integers is accepted).
    ``sizes[name, dim]``: the axis's original length. Both have the same keys, sorted; entries that keep everything are
    dropped, so plans that do the same are equal. ``blocks``: names of :class:`~stp_fx.analysis.blocks.Block`, sorted. They are
    removed first; entries for axes of tensors that are removed with them mean nothing. Raises :class:`PlanError`, naming the
    entry, for anything else.

    >>> plan = PrunePlan({("conv.weight", 0): [0, 2, 3]}, {("conv.weight", 0): 4})
    >>> plan.then(PrunePlan({("conv.weight", 0): [1, 2]}, {("conv.weight", 0): 3})).kept
    {('conv.weight', 0): array([2, 3])}
    """

    kept: Mapping[AxisKey, npt.NDArray[np.int64]]
    sizes: Mapping[AxisKey, int]
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not is_a(self.kept, Mapping) or not is_a(self.sizes, Mapping):
            raise PlanError(
                f"a plan is two mappings, kept and sizes; got {type(self.kept).__name__}, {type(self.sizes).__name__}"
            )
        if set(self.kept) != set(self.sizes):
            lonely = next(iter(set(self.kept) ^ set(self.sizes)))
            raise PlanError(f"plan entry {lonely!r} has {'no size' if lonely in self.kept else 'no kept indices'}")
        sizes = {_checked_key(key): _checked_size(key, size) for key, size in self.sizes.items()}
        done: dict[tuple[int, int], npt.NDArray[np.int64]] = {}  # axes that are cut alike share their indices
        given = dict(self.kept)
        for key, indices in given.items():
            if (id(indices), sizes[key]) not in done:
                done[id(indices), sizes[key]] = _checked_kept(key, indices, sizes[key])
        kept = {key: done[id(indices), sizes[key]] for key, indices in given.items()}
        shortened = sorted(key for key, indices in kept.items() if len(indices) < sizes[key])
        object.__setattr__(self, "kept", {key: kept[key] for key in shortened})
        object.__setattr__(self, "sizes", {key: sizes[key] for key in shortened})
        object.__setattr__(self, "blocks", _checked_blocks(self.blocks))

    @property
    def is_empty(self) -> bool:
        """True if the plan removes nothing."""
        return not self.kept and not self.blocks

    def without_blocks(self, names: Iterable[str] | None = None) -> PrunePlan:
        """The part of the plan about axes: of all tensors, or of those of these ``names``, which the removal of blocks leaves."""
        held = None if names is None else set(names)
        kept = {key: indices for key, indices in self.kept.items() if held is None or key[0] in held}
        return PrunePlan(kept, {key: self.sizes[key] for key in kept})

    def then(self, second: PrunePlan) -> PrunePlan:
        """This plan and then ``second``, whose indices refer to the tensors that this plan left, as one plan."""
        _check_plan("second", second)
        kept, sizes = dict(self.kept), dict(self.sizes)
        for key, indices in second.kept.items():
            if key not in kept:
                kept[key], sizes[key] = indices, second.sizes[key]
                continue
            if second.sizes[key] != len(kept[key]):
                raise PlanError(
                    f"plans do not follow each other at {_label(key)}: the first leaves {len(kept[key])} indices, "
                    f"the second is for an axis of {second.sizes[key]}"
                )
            kept[key] = kept[key][indices]
        return PrunePlan(kept, sizes, tuple({*self.blocks, *second.blocks}))

    def after(self, first: PrunePlan) -> PrunePlan:
        """The rest of this plan once ``first``, for the same tensors, is done, in the indices that are valid then.

        >>> both = PrunePlan({("conv.weight", 0): [0, 3]}, {("conv.weight", 0): 4})
        >>> both.after(PrunePlan({("conv.weight", 0): [0, 2, 3]}, {("conv.weight", 0): 4})).kept
        {('conv.weight', 0): array([0, 2])}
        """
        _check_plan("first", first)
        kept: dict[AxisKey, npt.NDArray[np.int64]] = {}
        sizes: dict[AxisKey, int] = {}
        for key, indices in self.kept.items():
            present = first.kept.get(key)
            if present is None:
                kept[key], sizes[key] = indices, self.sizes[key]
                continue
            if first.sizes[key] != self.sizes[key]:
                raise PlanError(f"plans for different axes: {_label(key)} of {self.sizes[key]} and of {first.sizes[key]}")
            kept[key], sizes[key] = np.flatnonzero(np.isin(present, indices)), len(present)
        return PrunePlan(kept, sizes, tuple(set(self.blocks) - set(first.blocks)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrunePlan):
            return NotImplemented
        alike = self.sizes == other.sizes and self.blocks == other.blocks
        return alike and all(np.array_equal(kept, other.kept[key]) for key, kept in self.kept.items())

    def __hash__(self) -> int:
        return hash(self.digest())

    def digest(self) -> str:
        """SHA-256 of the plan's content, in hexadecimal: the same for equal plans, on every machine."""
        state = hashlib.sha256(b"stp_fx_plan 1\n")
        for (name, dim), indices in self.kept.items():
            state.update(f"{len(name.encode())} {name} {dim} {self.sizes[name, dim]} {len(indices)}\n".encode())
            state.update(indices.astype("<i8").tobytes())
        for name in self.blocks:
            state.update(f"block {len(name.encode())} {name}\n".encode())
        return state.hexdigest()

    def to_json(self) -> str:
        """The plan as JSON; :meth:`from_json` is its inverse. Format: :mod:`stp_fx.analysis.plan_json`."""
        return encode_plan(self.kept, self.sizes, self.blocks)

    @classmethod
    def from_json(cls, text: str | bytes, axes: Mapping[AxisKey, int] | None = None) -> PrunePlan:
        """Read what :meth:`to_json` wrote. Raises :class:`PlanError`, naming the entry, for anything else.

        ``axes``: all the axes that the plan may have entries for, with their sizes; a text from elsewhere is then refused before
        it can ask for memory.
        """
        if axes is not None and not is_a(axes, Mapping):
            raise InputError(f"`axes` maps (tensor name, dimension) to sizes; got {shown(axes)}")
        return cls(*decode_plan(text, axes))

    def summary(self) -> str:
        """One line a block and a shortened axis, ``name:dim kept/size``, under a line of totals."""
        entries = (f"  {_label(key)} {len(kept)}/{self.sizes[key]}" for key, kept in self.kept.items())
        return "\n".join([self._totals(), *(f"  block {name}" for name in self.blocks), *entries])

    def _totals(self) -> str:
        removed = sum(self.sizes[key] - len(indices) for key, indices in self.kept.items())
        tensors = len({name for name, _ in self.kept})
        total = sum(self.sizes.values())
        blocks = f"{len(self.blocks)} block{'s' * (len(self.blocks) != 1)} removed, " if self.blocks else ""
        return f"{blocks}{len(self.kept)} axes of {tensors} tensors shortened, {removed} of {total} indices removed"

    def __repr__(self) -> str:
        return f"PrunePlan({self._totals()})"

    def _repr_html_(self) -> str:
        rows = [(*key, f"{len(kept)}/{self.sizes[key]}") for key, kept in self.kept.items()]
        return html_table(repr(self), ("tensor", "dim", "kept"), rows)


def _check_plan(argument: str, given: object) -> None:
    if not is_a(given, PrunePlan):
        raise InputError(f"`{argument}` is a {type(given).__name__}; give a PrunePlan")


def _label(key: AxisKey) -> str:
    return f"{key[0]}:{key[1]}"


def _checked_key(key: object) -> AxisKey:
    pair = cast("tuple[object, ...]", key) if is_a(key, tuple) else ()
    if len(pair) == 2 and isinstance(pair[0], str) and pair[0] and is_whole(pair[1]) and pair[1] >= 0:
        return pair[0], int(pair[1])
    raise PlanError(f"a plan entry's key is (tensor name, dimension >= 0); got {shown(key)}")


def _checked_blocks(names: object) -> tuple[str, ...]:
    if not is_a(names, tuple, list):
        raise PlanError(f"the blocks of a plan are a tuple of names; got {shown(names)}")
    given = cast("tuple[object, ...]", names)
    wrong = next((name for name in given if not isinstance(name, str) or not name), None)
    if wrong is not None or len(set(given)) < len(given):
        raise PlanError(f"the blocks of a plan are different names; got {shown(names if wrong is None else wrong)}")
    return tuple(sorted(cast("tuple[str, ...]", given)))


def _checked_size(key: AxisKey, size: object) -> int:
    if not is_whole(size) or size < 1:
        raise PlanError(f"{_label(key)}: the size of an axis is a positive integer; got {shown(size)}")
    return int(size)


def _checked_kept(key: AxisKey, indices: object, size: int) -> npt.NDArray[np.int64]:
    try:
        array = np.array(indices)  # a copy: the plan must not change with the caller's array
    except Exception:  # whatever an object's own conversion raises
        raise PlanError(f"{_label(key)}: kept indices are a flat sequence of integers; got {shown(indices)}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        if array.ndim == 1 and array.size == 0:
            raise PlanError(f"{_label(key)}: a plan keeps at least one index of every axis; got none")
        raise PlanError(f"{_label(key)}: kept indices are a flat sequence of integers; got {array.dtype} of shape {array.shape}")
    if array.size == 0:
        raise PlanError(f"{_label(key)}: a plan keeps at least one index of every axis; got none")
    array = array.astype(np.int64, copy=False)
    if array.min() < 0 or array.max() >= size:
        bad = array[(array < 0) | (array >= size)][0]
        raise PlanError(f"{_label(key)}: kept index {bad} is out of range for an axis of {size}")
    falls = np.flatnonzero(np.diff(array) <= 0)
    if falls.size:
        first, second = array[falls[0]], array[falls[0] + 1]
        raise PlanError(f"{_label(key)}: kept indices must ascend without duplicates; got {first} before {second}")
    return array
