"""``remove``, ``mask`` and ``unmask``: a plan carried out, as functions of a graph that give a new graph."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.blocks import planned_blocks
from stp_fx.analysis.build import analyze
from stp_fx.analysis.bypass import channels_of, tensor_names
from stp_fx.analysis.plan import PrunePlan
from stp_fx.errors import InputError, RewriteError
from stp_fx.ir.provenance import provenance_of, with_provenance
from stp_fx.rewrite.masks import add_block_masks, add_masks, drop_masks
from stp_fx.rewrite.refit import refit
from stp_fx.rewrite.rms_norm import rescale_rms_norms
from stp_fx.rewrite.slicing import copied, shortened_copy
from stp_fx.rewrite.without_blocks import without_blocks

__all__ = ["is_partial", "mask", "remove", "unmask"]


def remove(gm: fx.GraphModule, plan: PrunePlan) -> fx.GraphModule:
    """A new, smaller graph: parameters, buffers, gradients, module attributes and the graph's literals shortened by ``plan``,
    after its blocks have been taken out.

    The result has been run once on meta tensors, and every value has the shape that the analysis promised.

    Raises:
        InputError: ``plan`` is not a PrunePlan.
        PlanError: the plan does not fit the graph.
        RewriteError: the result would not have the promised shapes.
    """
    _check_plan(plan)
    if plan.blocks:
        gm = without_blocks(gm, plan.blocks)
        plan = plan.without_blocks(tensor_names(gm))
    graph = analyze(gm)
    survivors = graph.survivors(plan, partial=is_partial(gm))
    result = shortened_copy(gm, graph, survivors)
    if not plan.is_empty:
        refit(result, graph, survivors)
        rescale_rms_norms(result, graph, survivors)
        drop_masks(result, idle=True)
    known = provenance_of(result)
    own = _of_original(plan, known.added)
    masked = None if known.masked is None else known.masked.after(plan)
    with_provenance(
        result,
        plan=own if known.plan is None else known.plan.then(own),
        masked=None if masked is None or masked.is_empty else masked,
        report=None,
    )
    _check_lengths(result)
    return result


def mask(gm: fx.GraphModule, plan: PrunePlan, device: torch.device | None = None) -> fx.GraphModule:
    """A graph of the same shapes in which consumers read zero from the units of ``plan``, and of an earlier mask; sums read zero
    from its blocks. Masks are on ``device``, by default that of the parameters.

    Raises:
        InputError: ``plan`` is not a PrunePlan.
        PlanError: the plan does not fit the graph.
    """
    _check_plan(plan)
    result = copied(gm)
    together, before = plan, provenance_of(gm).masked
    if before is not None:
        if not plan.blocks:
            analyze(gm).survivors(plan, partial=True)  # a plan that does not fit is refused by its own names
        together = _both(before, plan)
        drop_masks(result)
    blocks = planned_blocks(result, together.blocks) if together.blocks else []
    reduced, channels = channels_of(result, together)
    graph = analyze(reduced)
    add_masks(result, graph, graph.survivors(channels, partial=is_partial(gm)), device)
    if blocks:
        add_block_masks(result, blocks)
    return with_provenance(result, masked=together, report=None)


def unmask(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy without masks; weights are as they are. A graph that is not masked is returned as it is."""
    if provenance_of(gm).masked is None:
        return gm
    result = copied(gm)
    drop_masks(result)
    return with_provenance(result, masked=None)


def is_partial(gm: fx.GraphModule) -> bool:
    """Whether plans need not name every axis: passes have added mask buffers or biases since the capture."""
    known = provenance_of(gm)
    return known.masked is not None or bool(known.added)


def _check_plan(plan: object) -> None:
    if not isinstance(plan, PrunePlan):
        raise InputError(f"`plan` is a {type(plan).__name__}; give a PrunePlan (PrunePlan.from_json reads one)")


def _both(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """The positions that two plans for one graph keep together."""
    kept, sizes = dict(first.kept), dict(first.sizes)
    for key, indices in second.kept.items():
        sizes[key] = second.sizes[key]
        kept[key] = np.intersect1d(kept[key], indices) if key in kept else indices
    return PrunePlan(kept, sizes, tuple({*first.blocks, *second.blocks}))


def _of_original(plan: PrunePlan, added: Collection[str]) -> PrunePlan:
    """The part of a plan about tensors that the graph had when it was captured, so that it fits the original network."""
    kept = {key: indices for key, indices in plan.kept.items() if key[0] not in added}
    return PrunePlan(kept, {key: plan.sizes[key] for key in kept})


def _check_lengths(result: fx.GraphModule) -> None:
    tensors = dict(result.named_parameters(remove_duplicate=False))
    for (name, dim), kept in provenance_of(result).plan.kept.items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape[dim] != len(kept):
            raise RewriteError(f"'{name}' dim {dim} has {tensor.shape[dim]} positions left, the plan keeps {len(kept)}")
