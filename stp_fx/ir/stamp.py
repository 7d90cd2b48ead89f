"""Stamps: what a measurement or a score was made from, so that it is not used for anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import torch
from torch import fx

from stp_fx.errors import InputError
from stp_fx.ir.provenance import structure_of

__all__ = ["Stamp", "check_stamp", "stamp_of"]

_SAMPLES = 4
"""Values of every tensor that are compared: writes through ``.data`` move no version counter."""


@dataclasses.dataclass(frozen=True)
class Stamp:
    """``structure``: of the graph and its tensors' shapes. ``weights``: memory, version and some values of every tensor."""

    structure: int
    weights: Hashable


def stamp_of(gm: fx.GraphModule) -> Stamp:
    """The stamp of a graph as it is now; it reads a few values of each tensor."""
    tensors = [t.detach() for t in (*gm.parameters(), *gm.buffers())]
    places = tuple((t.data_ptr() if t.device.type != "meta" else 0, _version(t)) for t in tensors)
    return Stamp(hash(structure_of(gm)), (places, _sampled(tensors)))


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


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sampled(tensors: list[torch.Tensor]) -> Hashable:
    """A few values of every tensor, by device and dtype; gathered with one transfer for each."""
    found: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized):
            flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor[(..., *[0] * (tensor.dim() - 1))].reshape(-1)
            found.setdefault((tensor.device, tensor.dtype), []).append(flat[:: max(len(flat) // _SAMPLES, 1)][:_SAMPLES])
    return tuple((str(key), repr(torch.cat(values).tolist())) for key, values in found.items())
