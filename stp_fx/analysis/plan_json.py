"""The JSON of a plan, version 1.

``{"stp_fx_plan": 1, "cuts": [{"size": 64, "kept": [0, 3, [8, 31]], "axes": [["conv.weight", 0], ["bn.weight", 0]]}]}``

A cut lists the axes that keep the same indices of the same size, so indices shared by a convolution, its norm and its
consumers are written once. An item of ``kept`` is an index, or the first and last of a run of at least three. A plan that removes
blocks also has ``"blocks": ["layers.3.mlp"]``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stp_fx.errors import PlanError

__all__ = ["VERSION", "decode_blocks", "decode_plan", "encode_plan"]

VERSION = 1
_KEY = "stp_fx_plan"
# Two orders of magnitude above any axis in use; a hostile file must not ask for terabytes.
_LARGEST_SIZE = 1 << 28
# A run of a few letters may stand for any number of indices. Any text may ask for 32 MB, a longer one for more: criteria keep
# scattered indices, so that a plan has an item for every few of them.
_INDICES, _INDICES_A_LETTER = 1 << 22, 256

AxisKey = tuple[str, int]


def encode_plan(kept: Mapping[AxisKey, np.ndarray], sizes: Mapping[AxisKey, int], blocks: Sequence[str] = ()) -> str:
    """Plan as JSON text; entries in the order of ``kept``."""
    cuts: dict[tuple[int, bytes], list[AxisKey]] = {}
    for key, indices in kept.items():
        cuts.setdefault((sizes[key], indices.tobytes()), []).append(key)
    entries = [
        {"size": size, "kept": _runs(kept[axes[0]]), "axes": [list(axis) for axis in axes]} for (size, _), axes in cuts.items()
    ]
    own = {"blocks": list(blocks)} if blocks else {}
    return json.dumps({_KEY: VERSION, **own, "cuts": entries}, separators=(",", ":"))


def _runs(indices: np.ndarray) -> list[Any]:
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    items: list[Any] = []
    for run in np.split(indices, breaks):
        items += [[int(run[0]), int(run[-1])]] if len(run) > 2 else run.tolist()
    return items


def decode_plan(
    text: str | bytes, axes: Mapping[AxisKey, int] | None = None
) -> tuple[dict[AxisKey, np.ndarray], dict[AxisKey, int], tuple[str, ...]]:
    """``kept``, ``sizes`` and ``blocks`` of a plan; entries for axes that are not in ``axes``, or of other sizes, are refused.

    Raises :class:`PlanError` for what :func:`encode_plan` cannot have written."""
    document = _document(text)
    kept: dict[AxisKey, np.ndarray] = {}
    sizes: dict[AxisKey, int] = {}
    room = _INDICES + _INDICES_A_LETTER * len(text)
    for place, cut in enumerate(document["cuts"]):
        size, runs, cut_axes = _cut(f"cuts[{place}]", cut, axes)
        room -= sum(last - first + 1 for first, last in runs)
        if axes is None and room < 0:
            raise PlanError(
                f"cuts[{place}]: a text of {len(text)} letters asks for more than {_INDICES + _INDICES_A_LETTER * len(text)} "
                "indices; if it is right, give `axes`, the sizes of the graph's axes"
            )
        indices = np.concatenate([np.arange(first, last + 1, dtype=np.int64) for first, last in runs])
        for axis in cut_axes:
            if axis in kept:
                raise PlanError(f"cuts[{place}]: axis {axis[0]}:{axis[1]} is listed twice")
            kept[axis], sizes[axis] = indices, size
    return kept, sizes, tuple(document.get("blocks", ()))


def decode_blocks(text: str | bytes) -> tuple[str, ...]:
    """The blocks of a plan alone. Raises :class:`PlanError` for what is no plan."""
    return tuple(_document(text).get("blocks", ()))


def _document(text: str | bytes) -> dict[str, Any]:
    """A plan's JSON object, of which the fields are checked and the cuts not yet."""
    document = _parse(text)
    if not isinstance(document, dict) or _KEY not in document:
        raise PlanError(f'not a plan: a JSON object with "{_KEY}" is expected, got {_short(document)}')
    version = document[_KEY]
    if type(version) is not int or version != VERSION:
        raise PlanError(
            f"plan version {_short(version)} is unknown; this stp_fx reads version {VERSION}: "
            "use the stp_fx that wrote it, or a newer one"
        )
    _check_fields("plan", document, {_KEY, "cuts"} | (document.keys() & {"blocks"}))
    if not isinstance(document["cuts"], list):
        raise PlanError(f'"cuts" is a list; got {_short(document["cuts"])}')
    blocks = document.get("blocks", [])
    if (
        not isinstance(blocks, list)
        or any(type(name) is not str or not name for name in blocks)
        or len(set(blocks)) < len(blocks)
    ):
        raise PlanError(f'"blocks" is a list of different names; got {_short(blocks)}')
    return document


def _parse(text: str | bytes) -> Any:
    if not isinstance(text, (str, bytes, bytearray)):
        raise PlanError(f"a plan is read from JSON text; got {type(text).__name__}")
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"not a plan: invalid JSON ({error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise PlanError(
            f"not a plan: name {next(name for name in names if names.count(name) > 1)!r} is given twice in one object"
        )
    return found


def _cut(where: str, cut: Any, known: Mapping[AxisKey, int] | None) -> tuple[int, list[tuple[int, int]], list[AxisKey]]:
    if not isinstance(cut, dict):
        raise PlanError(f"{where}: an object is expected; got {_short(cut)}")
    _check_fields(where, cut, {"size", "kept", "axes"})
    axes = _axes(where, cut["axes"])
    where = f"{where} ({axes[0][0]}:{axes[0][1]})"
    size = cut["size"]
    if type(size) is not int or not 1 <= size <= _LARGEST_SIZE:
        raise PlanError(f"{where}: size is an integer in 1..{_LARGEST_SIZE}; got {_short(size)}")
    for axis in axes if known is not None else ():  # before anything of that size is made
        if known.get(axis) != size:  # type: ignore[union-attr]
            found = "no such axis" if axis not in known else f"one of {known[axis]}"  # type: ignore[operator,index]
            raise PlanError(f"{where}: the plan is for an axis '{axis[0]}' dim {axis[1]} of {size}; there is {found}")
    if not isinstance(cut["kept"], list) or not cut["kept"]:
        raise PlanError(f"{where}: kept is a list of at least one index or [first, last] run; got {_short(cut['kept'])}")
    return size, _kept_runs(where, cut["kept"], size), axes


def _kept_runs(where: str, items: list[Any], size: int) -> list[tuple[int, int]]:
    """First and last of each run; they do not overlap, so together they have no more than ``size`` indices."""
    runs: list[tuple[int, int]] = []
    previous = -1
    for item in items:
        first, last = _ends(where, item)
        if not 0 <= first <= last < size:
            raise PlanError(f"{where}: {_short(item)} is out of range, or backwards, for an axis of {size}")
        if first <= previous:
            raise PlanError(f"{where}: kept indices must ascend without duplicates; got {_short(item)} after {previous}")
        previous = last
        runs.append((first, last))
    return runs


def _axes(where: str, axes: Any) -> list[AxisKey]:
    if not isinstance(axes, list) or not axes:
        raise PlanError(f"{where}: axes is a list of at least one [tensor name, dimension]; got {_short(axes)}")
    for axis in axes:
        if not (isinstance(axis, list) and len(axis) == 2 and type(axis[0]) is str and type(axis[1]) is int):
            raise PlanError(f"{where}: an axis is [tensor name, dimension]; got {_short(axis)}")
    return [(name, dim) for name, dim in axes]


def _ends(where: str, item: Any) -> tuple[int, int]:
    ends = item if isinstance(item, list) else [item, item]
    if len(ends) != 2 or any(type(end) is not int for end in ends):
        raise PlanError(f"{where}: an item of kept is an index or [first, last]; got {_short(item)}")
    return ends[0], ends[1]


def _check_fields(where: str, found: dict[str, Any], expected: set[str]) -> None:
    if set(found) != expected:
        raise PlanError(f"{where}: fields {', '.join(sorted(expected))} are expected; got {', '.join(sorted(found)) or 'none'}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
