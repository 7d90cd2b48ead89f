"""The contents of a file beside its tensors: JSON texts in the metadata of a safetensors file, format 1.

``stp_fx``: the fields of :class:`Contents` but for the plans; ``stp_fx_plan`` and ``stp_fx_masked`` (if there are masks): plans
as :mod:`stp_fx.analysis.plan_json` writes them; ``stp_fx_sha256``: a checksum of these texts and of all tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stp_fx.errors import FileError
from stp_fx.ir import Call

__all__ = ["FORMAT", "Contents", "checksum", "decode", "encode", "is_whole"]

FORMAT = 1
_VERSION = "stp_fx_file"
_MAIN, _PLAN, _MASKED, _SUM = "stp_fx", "stp_fx_plan", "stp_fx_masked", "stp_fx_sha256"


@dataclasses.dataclass(frozen=True)
class Contents:
    """``plan`` and ``masked``: plans as JSON. ``original``: every tensor of the network before pruning, with its sizes, tied
    ones once; ``ties`` gives the other names of those. ``added``: parameters that passes have made. ``complex``: tensors that are
    stored as pairs of real numbers. ``order``: dimensions from the slowest to the fastest in memory, where that is not
    their order. ``frozen``: parameters without gradient. ``training`` is the root's mode and ``other`` names the modules
    that are in the other one. ``call``: how the network was captured. ``basis``: what a change of basis has done to the structure
    (:mod:`stp_fx.rewrite.basis.record`); ``turned``: the groups whose channels it has combined.
    """

    plan: str
    masked: str | None
    original: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str]
    added: tuple[str, ...]
    complex: tuple[str, ...]
    order: Mapping[str, tuple[int, ...]]
    frozen: tuple[str, ...]
    training: bool
    other: tuple[str, ...]
    call: Call | None
    basis: tuple[str, ...] = ()
    turned: tuple[str, ...] = ()


def encode(contents: Contents, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The metadata of a file with these contents and ``tensors``."""
    main = dataclasses.asdict(contents)
    texts = {_PLAN: main.pop("plan"), _MASKED: main.pop("masked")}
    texts = {key: text for key, text in texts.items() if text is not None}
    texts[_MAIN] = json.dumps({_VERSION: FORMAT, **main}, separators=(",", ":"), allow_nan=False)
    return {"format": "pt", **texts, _SUM: checksum(texts, tensors)}


def decode(metadata: Mapping[str, str]) -> Contents:
    """Reads what :func:`encode` wrote; the checksum is the caller's to compare.

    Raises:
        FileError: no file of stp_fx, a newer format, or a field that cannot be.
    """
    if _MAIN not in metadata:
        raise FileError("a safetensors file, but not one that stp_fx.save wrote: it has no plan")
    document = _parse(metadata[_MAIN])
    version = document.pop(_VERSION, None)
    if type(version) is int and version > FORMAT:
        raise FileError(f"of format {str(version)[:20]}, and this stp_fx reads formats up to {FORMAT}: use a newer stp_fx")
    if type(version) is not int or version != FORMAT:
        raise FileError(f"of an unknown format {str(version)[:20]}; this stp_fx reads format {FORMAT}")
    if _PLAN not in metadata or _SUM not in metadata:
        raise FileError(f"damaged: its metadata lacks {_PLAN if _PLAN not in metadata else _SUM!r}")
    for later in ("basis", "turned"):  # files of earlier versions have none
        document.setdefault(later, [])
    if set(document) != set(_FIELDS):
        wrong = sorted(set(document) ^ set(_FIELDS))[0]
        raise FileError(f"damaged: field {wrong[:60]!r} of its metadata is {'missing' if wrong in _FIELDS else 'unknown'}")
    fields = {}
    for name, read in _FIELDS.items():
        try:
            fields[name] = read(document[name])
        except ValueError as error:
            raise FileError(f"damaged: {name!r} in its metadata {error}") from None
    return Contents(plan=metadata[_PLAN], masked=metadata.get(_MASKED), **fields)


def checksum(texts: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the texts of this format and over names, dtypes, shapes and bytes of all tensors, in hexadecimal."""
    state = hashlib.sha256()
    for key in (_MAIN, _PLAN, _MASKED):
        text = texts.get(key, "").encode()
        state.update(f"{key} {len(text)}\n".encode() + text)
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{len(name.encode())} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def is_whole(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the checksum in the metadata is that of the file."""
    return metadata.get(_SUM) == checksum(metadata, tensors)


def _parse(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, object_pairs_hook=unique_names, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FileError(f"damaged: its metadata is no JSON ({str(error)[:200]})") from None
    if not isinstance(document, dict):
        raise FileError("damaged: its metadata is no JSON object")
    return document


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; one that gives a name twice is a ``ValueError``."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(type(name) is str for name in value) or len(set(value)) < len(value):
        raise ValueError("is a list of different names")
    return tuple(value)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in value):
        raise ValueError("gives each tensor a list of integers")
    return tuple(value)


def _mapping(read: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def mapping(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError("is an object by tensor")
        return {name: read(item) for name, item in value.items()}

    return mapping


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("holds something that is no text")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("is true or false")
    return value


def _call(value: Any) -> Call | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) - {"outputs"} != {"frontend", "args", "kwargs", "training", "other"}:
        raise ValueError("is the record of a capture")
    outputs = value.get("outputs", [])  # files of earlier versions have none
    if not isinstance(outputs, list) or any(type(name) not in (str, int) for name in outputs):
        raise ValueError("names outputs by words and positions")
    known = _text(value["frontend"]), value["args"], value["kwargs"], _flag(value["training"]), _names(value["other"])
    return Call(*known, tuple(outputs))


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "original": _mapping(_sizes),
    "ties": _mapping(_text),
    "added": _names,
    "complex": _names,
    "order": _mapping(_sizes),
    "frozen": _names,
    "training": _flag,
    "other": _names,
    "call": _call,
    "basis": _names,
    "turned": _names,
}
