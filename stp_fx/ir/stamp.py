"""Stamps: what a measurement or a score was made from, so that it is not used for anything else."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Hashable, Sequence

import torch
from torch import fx, nn

from stp_fx.errors import InputError
from stp_fx.ir.provenance import structure_of
from stp_fx.ir.shapes import tensors_of

__all__ = ["Stamp", "check_stamp", "stamp_of", "weights_of"]

_BYTES = 8
"""Read at the beginning, in the middle and at the end of every tensor: writes through ``.data`` move no version counter."""


@dataclasses.dataclass(frozen=True)
class Stamp:
    """``structure``: of the graph and its tensors' shapes. ``weights``: memory, version and some values of every tensor."""

    structure: int
    weights: Hashable


def stamp_of(gm: fx.GraphModule) -> Stamp:
    """The stamp of a graph as it is now; it reads a few values of each tensor."""
    return Stamp(hash(structure_of(gm)), weights_of(tensors_of(gm)))


def check_stamp(gm: fx.GraphModule, stamp: Stamp | None, what: str, remedy: str) -> None:
    """Refuses what was made from another graph, or from weights that have changed since.

    Raises:
        InputError: names what it is and what to do.
    """
    if stamp is None:
        return
    now = stamp_of(gm)
    if now.structure != stamp.structure:
        raise InputError(f"{what} were made from another graph: {remedy}")
    if now.weights != stamp.weights:
        raise InputError(f"{what} were made before the weights of this graph changed (or from a copy of it): {remedy}")


def weights_of(tensors: Sequence[torch.Tensor]) -> Hashable:
    """Memory, version counter and a few values of every tensor."""
    places: list[tuple[int, int]] = []
    read: list[bytes] = []
    elsewhere: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        version = 0 if tensor.is_inference() else tensor._version
        if tensor.is_meta or tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, nn.Parameter):
            places.append((id(tensor), version))
            continue
        place = tensor.data_ptr()
        places.append((place, version))
        if tensor.is_cpu and tensor.is_contiguous():
            read.append(_bytes_at(place, tensor.nbytes))
        elif tensor.numel():
            elsewhere.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    return tuple(places), b"".join(read), tuple((str(key), _gathered(each)) for key, each in elsewhere.items())


def _bytes_at(place: int, size: int) -> bytes:
    """The first, middle and last bytes of a block of memory: read directly, which takes a hundredth of an indexing."""
    if size <= 3 * _BYTES:
        return ctypes.string_at(place, size)
    return b"".join(ctypes.string_at(place + at, _BYTES) for at in (0, size // 2, size - _BYTES))


def _gathered(tensors: Sequence[torch.Tensor]) -> bytes:
    """A few values of each tensor, with one transfer for all."""
    few = [t.reshape(-1)[:: max(t.numel() // 3, 1)] if t.is_contiguous() else t[(0,) * t.dim()].reshape(1) for t in tensors]
    return torch.cat(few).cpu().view(torch.uint8).numpy().tobytes()
