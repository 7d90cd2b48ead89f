"""Where a graph comes from: the recorded example, how it was captured, and what passes have done to it since."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from stp_fx.errors import InputError
from stp_fx.ir.call import Call
from stp_fx.ir.captured import KEY
from stp_fx.ir.nested import mapped
from stp_fx.ir.shapes import tensors_of
from stp_fx.ir.validation import Validation

__all__ = [
    "MASK_PREFIX",
    "Provenance",
    "attach_provenance",
    "example_of",
    "floating_dtype",
    "has_provenance",
    "is_mask_buffer",
    "needs_whole_tensors",
    "provenance_of",
    "structure_of",
    "with_provenance",
]


MASK_PREFIX = "stp_fx_dead"
"""How the names of mask buffers begin."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Lives in ``gm.meta["stp_fx"]``; a value, so copies of a graph may share it.

    ``inputs`` holds one value per placeholder, in graph order: tensors on the meta device with the recorded example's
    shape and dtype, other values (numbers, strings, ``None``) as they were. ``plan`` is what has been removed since the
    capture, ``masked`` the plan of what is masked now, ``report`` is that of the last selection that was carried out, ``added``
    names the parameters that passes have added, ``dtype`` is that of the parameters at capture, ``frontend`` what captured it,
    ``call`` how, for another process to do the same. ``arguments`` are all arguments of the original's ``forward`` by name,
    in its order: tensors as in ``inputs``, plain values as they were; what is neither is left out and named in ``lost``.
    ``validation`` is what was checked at capture, None if nothing was. ``held`` names the modules that the model's own ``train``
    keeps in the other mode, by the mode that it is called with. ``read`` holds the whole numbers of those inputs, by position,
    whose numbers the forward read. ``basis`` are the changes of structure that a change of basis has made, as JSON
    (:mod:`stp_fx.rewrite.basis.record`); ``turned`` names the groups whose channels are combinations of earlier ones,
    which no file keeps.
    """

    inputs: tuple[Any, ...]
    notes: tuple[str, ...] = ()
    plan: Any = None
    masked: Any = None
    added: tuple[str, ...] = ()
    report: Any = None
    dtype: torch.dtype | None = None
    frontend: str = "fx"
    call: Call | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lost: tuple[str, ...] = ()
    validation: Validation | None = None
    held: Mapping[bool, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    read: Mapping[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    basis: tuple[str, ...] = ()
    turned: tuple[str, ...] = ()

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Provenance:
        return self


def attach_provenance(gm: fx.GraphModule, provenance: Provenance) -> fx.GraphModule:
    """Records ``provenance`` on a graph that the caller has made; returns the graph."""
    if provenance.dtype is None:
        provenance = dataclasses.replace(provenance, dtype=floating_dtype(gm))
    gm.meta[KEY] = provenance
    return gm


def with_provenance(gm: fx.GraphModule, **changes: Any) -> fx.GraphModule:
    """Replaces fields of the provenance of a graph that the caller has made; returns the graph."""
    return attach_provenance(gm, dataclasses.replace(provenance_of(gm), **changes))


def has_provenance(gm: torch.nn.Module) -> bool:
    """Whether ``gm`` is a graph that :func:`stp_fx.trace` has captured, or one that passes made of it."""
    return _found(gm) is not None


def provenance_of(gm: fx.GraphModule) -> Provenance:
    """The record of :func:`stp_fx.trace`.

    Raises:
        InputError: the graph was not made by :func:`stp_fx.trace` and carries no example.
    """
    found = _found(gm)
    if found is None:
        raise InputError(
            f"{type(gm).__name__} carries no recorded example inputs: it is not a graph that stp_fx.trace captured. "
            "Capture the model with stp_fx.trace(model, example_inputs) and give what that returns"
        )
    return found


def _found(gm: Any) -> Provenance | None:
    if not isinstance(gm, fx.GraphModule):
        return None
    found = gm.meta.get(KEY)
    return found if isinstance(found, Provenance) else None


def structure_of(gm: fx.GraphModule) -> tuple[Any, ...]:
    """The computation of a graph apart from its numbers: its code, and the shapes and dtypes of its tensors and recorded example.

    Raises:
        InputError: the graph carries no recorded example.
    """
    inputs = provenance_of(gm).inputs
    shapes = tuple((t.shape, t.dtype) for t in tensors_of(gm))
    return gm.code, shapes, tuple(v.shape if isinstance(v, torch.Tensor) else repr(v) for v in inputs)


def example_of(gm: fx.GraphModule) -> tuple[Any, ...]:
    """The recorded example, one meta value per placeholder; floating inputs follow ``gm.double()``, ``gm.half()`` and the like.

    Raises:
        InputError: the graph carries no recorded example.
    """
    known, now = provenance_of(gm), floating_dtype(gm)
    if now is None or now == known.dtype:
        return known.inputs
    return mapped(torch.Tensor, lambda value: value.to(now) if value.dtype == known.dtype else value, known.inputs)


def floating_dtype(gm: torch.nn.Module) -> torch.dtype | None:
    """The dtype of the first floating parameter."""
    return next((p.dtype for p in gm.parameters() if p.is_floating_point()), None)


def is_mask_buffer(name: str) -> bool:
    """Whether a tensor of this name is a mask, so no part of the network itself."""
    return name.startswith(MASK_PREFIX)


def needs_whole_tensors(gm: torch.nn.Module) -> None:
    """Raises if parameters are spread over processes.

    Raises:
        InputError: names the first parameter that is a ``DTensor``.
    """
    # `placements`: of a DTensor, whose import takes most of a second
    if not any(hasattr(tensor, "placements") for tensor in tensors_of(gm)):
        return
    for name, parameter in gm.named_parameters():
        placements = getattr(parameter, "placements", None)
        if placements is not None:
            raise InputError(
                f"{name!r} is sharded over processes ({placements}); masks, removal and scores need whole tensors. "
                "Give it to a PATPassManager with `wrap`, or prune before `fully_shard` or `parallelize_module` is applied"
            )
