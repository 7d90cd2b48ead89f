"""The second front end: what Python's tracer cannot follow, ``torch.export`` can; its ATen calls are raised to PyTorch's own.

Exported graphs bake sizes, devices and the mode in. Here sizes stay free where the model leaves them free (a size that it does
not is asserted), devices follow the input, and an export in training and one in evaluation are joined to one graph.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from stp_fx.errors import InputError, TraceError
from stp_fx.ir.batch_of_one import allow_one, batch_of_one
from stp_fx.ir.captured import CapturedGraph
from stp_fx.ir.example import on_meta
from stp_fx.ir.export_leaves import leaves_kept
from stp_fx.ir.export_quiet import quiet_export
from stp_fx.ir.export_raise import Raised
from stp_fx.ir.join import joined
from stp_fx.ir.kept import containers_kept
from stp_fx.ir.modes import has_modes
from stp_fx.ir.patches import hooks_seen
from stp_fx.ir.provenance import Provenance, attach_provenance
from stp_fx.ir.proxies import REGISTERS
from stp_fx.ir.random_ops import drawn_from, frozen_draws, generator_states
from stp_fx.ir.stored import assigned
from stp_fx.ir.train_eval import in_mode, one_sided, take_flags

__all__ = ["capture_with_export"]

_log = logging.getLogger(__name__)


def capture_with_export(
    model: nn.Module, arguments: dict[str, Any], named: frozenset[str]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A GraphModule over the model's own parameters and buffers, in its mode, with a placeholder for each tensor; and notes.

    ``arguments`` are those of ``forward`` by parameter name, ``named`` the ones that were given by name.

    Raises:
        TraceError: ``torch.export`` cannot capture it.
    """
    gm, notes = _both_modes(model, arguments, named)
    _allow_one(gm, model, arguments, named)
    return gm, notes


def _both_modes(model: nn.Module, arguments: dict[str, Any], named: frozenset[str]) -> tuple[CapturedGraph, tuple[str, ...]]:
    """One graph for training and evaluation; for the model's own mode, with a note, where the other cannot be exported."""
    now, notes = _exported(model, arguments, named, model.training)
    try:
        other, more = _exported(model, arguments, named, not model.training)
    except TraceError as error:
        take_flags(now, model)
        return now, (*notes, one_sided(now, model, str(error)))
    gm = joined(*((now, other) if model.training else (other, now)), model)
    return gm, tuple(dict.fromkeys((*notes, *more)))


def _allow_one(gm: CapturedGraph, model: nn.Module, arguments: dict[str, Any], named: frozenset[str]) -> None:
    """Lets a batch of one pass, if the graph for it is the same."""
    one = batch_of_one(arguments)
    if one is None:
        return
    try:
        single, _ = _both_modes(model, one, named) if has_modes(gm.graph) else _exported(model, one, named, model.training)
    except TraceError as error:
        _log.debug("%s: no graph for a batch of one: %s", type(model).__name__, error)
        return
    allow_one(gm, one, single)


def _exported(
    model: nn.Module, arguments: dict[str, Any], named: frozenset[str], training: bool
) -> tuple[CapturedGraph, tuple[str, ...]]:
    try:
        mode = nullcontext() if training == model.training else in_mode(model, training)
        states = generator_states()
        with (
            mode,
            containers_kept(model, []) as held,
            hooks_seen() as hooks,
            quiet_export() as written,
            leaves_kept(model) as leaves,
        ):
            args = tuple(value for name, value in arguments.items() if name not in named)
            kwargs = {name: value for name, value in arguments.items() if name in named}
            every = pytree.tree_map(_free_sizes, dict(arguments))
            program = torch.export.export(model, args, kwargs, dynamic_shapes=every, strict=False)
            raised = Raised(model, program, arguments, named, leaves, training)
    except (TraceError, InputError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        if "fake tensor" in lines[0] or "not tracked with proxy" in lines[0]:
            lines = ["it lost track of a tensor, as reading or assigning .data makes it do: use detach(), or write under no_grad"]
        raise TraceError(f"{type(error).__name__}: {lines[0][:300]}") from error
    gm = raised.graph_module()
    places = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    attach_provenance(gm, Provenance(tuple(on_meta(arguments[name]) for name in places), frontend="export"))
    draws = frozen_draws((drawn_from(states) - {"torch"}).union(held.drawn))
    remarks = [f"the forward {REGISTERS} (at {line})" for line in dict.fromkeys(hooks)]
    return gm, (*raised.notes, *draws, *assigned(written), *remarks)


def _free_sizes(value: Any) -> dict[int, Any] | None:
    """All of them, but for 0 and 1, which ``torch.export`` fixes."""
    if not isinstance(value, torch.Tensor):
        return None
    return {dim: torch.export.Dim.AUTO for dim, size in enumerate(value.shape) if size > 1}
