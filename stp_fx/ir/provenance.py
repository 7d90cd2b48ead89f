"""What stp_fx keeps beside a graph: the recorded example, notes of the capture, cached analyses, the plan applied so far."""

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

__all__ = ["Provenance", "attach_provenance", "example_of", "has_provenance", "needs_whole_tensors", "provenance_of"]


@dataclasses.dataclass
class Provenance:
    """Lives in ``gm.meta["stp_fx"]``.

    ``inputs`` holds one value per placeholder, in graph order: tensors on the meta device with the recorded example's
    shape and dtype, other values (numbers, strings, ``None``) as they were. ``plan`` is what has been removed since the
    capture, ``masked`` the plan of what is masked now, ``report`` tells of the last run that did either, ``added`` names
    the parameters that passes have added, ``dtype`` is that of the parameters at capture, ``frontend`` what captured it,
    ``call`` how, for another process to do the same. ``arguments`` are all arguments of the original's ``forward`` by name,
    in its order: tensors as in ``inputs``, plain values as they were; what is neither is left out and named in ``lost``.
    ``cache`` holds analyses; it never travels with a copy, since a copy may be changed.
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
    cache: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Provenance:
        return dataclasses.replace(self, cache={})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}}


def attach_provenance(gm: fx.GraphModule, state: Provenance) -> fx.GraphModule:
    if state.dtype is None:
        state.dtype = _floating_dtype(gm)
    gm.meta[KEY] = state
    return gm


def example_of(gm: fx.GraphModule) -> tuple[Any, ...]:
    """The recorded example, one meta value per placeholder; floating inputs follow ``gm.double()``, ``gm.half()`` and the like.

    Raises:
        InputError: the graph carries no recorded example.
    """
    state, now = provenance_of(gm), _floating_dtype(gm)
    if now is None or now == state.dtype:
        return state.inputs
    return mapped(torch.Tensor, lambda value: value.to(now) if value.dtype == state.dtype else value, state.inputs)


def _floating_dtype(gm: fx.GraphModule) -> torch.dtype | None:
    """The dtype of the first floating parameter."""
    return next((p.dtype for p in gm.parameters() if p.is_floating_point()), None)


def has_provenance(gm: torch.nn.Module) -> bool:
    return isinstance(gm, fx.GraphModule) and isinstance(gm.meta.get(KEY), Provenance)


def provenance_of(gm: fx.GraphModule) -> Provenance:
    """The state that ``stp_fx.trace`` recorded.

    Raises:
        InputError: the graph was not made by ``stp_fx.trace`` and carries no example.
    """
    if not has_provenance(gm):
        raise InputError(
            f"{type(gm).__name__} carries no recorded example inputs. "
            "Pass it through stp_fx.trace(model, example_inputs), or give example_inputs to this call."
        )
    return gm.meta[KEY]


def needs_whole_tensors(gm: torch.nn.Module) -> None:
    """Raises if parameters are spread over processes.

    Raises:
        InputError: names the first parameter that is a ``DTensor``.
    """
    for name, parameter in gm.named_parameters():
        placements = getattr(parameter, "placements", None)  # of a DTensor, whose import takes most of a second
        if placements is not None:
            raise InputError(
                f"{name!r} is sharded over processes ({placements}); masks, removal and scores need whole tensors. "
                "Prune before `fully_shard` or `parallelize_module` is applied, or train with DistributedDataParallel"
            )
