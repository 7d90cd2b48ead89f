"""Graphs that follow every rewrite of another: moving averages of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from stp_fx.checks import is_a, listed_argument
from stp_fx.errors import InputError, RewriteError
from stp_fx.ir.provenance import has_provenance, is_mask_buffer, provenance_of
from stp_fx.measure.measured import measure
from stp_fx.passes import Artifacts, Pipeline, RecalibrateBatchNorm
from stp_fx.passes.compensations import Compensation
from stp_fx.rewrite.bias import restore_biases
from stp_fx.rewrite.removal import mask, remove
from stp_fx.rewrite.slicing import copied
from stp_fx.selection import PrunePlan

__all__ = ["followed", "listed_followers", "restored"]


def listed_followers(followers: object, model: fx.GraphModule) -> tuple[tuple[nn.Module, ...], tuple[fx.GraphModule, ...]]:
    """Further modules as a tuple, and the graphs in them; a wrapper such as ``AveragedModel`` stands for the graph in it.

    Raises:
        InputError: one graph in place of a list, something that is or holds no traced graph, the model itself, or a graph of
            another structure.
    """
    wanted = "give a list of graphs of the same structure, such as [AveragedModel(gm)]"
    given = () if is_a(followers, tuple) and not followers else followers
    modules = listed_argument("followers", given, wanted)
    found = tuple(_graph(each, wanted) for each in modules)
    own = {id(p) for p in model.parameters()}
    for each in found:
        if any(id(p) in own for p in each.parameters()):
            raise InputError(f"`followers` holds the model, or a graph that shares parameters with it: {wanted}")
        if _shapes(each) != _shapes(model):
            raise InputError(f"`followers` holds a {type(each).__name__} of another structure than the model: {wanted}")
    return modules, found


def _graph(given: Any, wanted: str) -> fx.GraphModule:
    for each in (given, getattr(given, "module", None)) if is_a(given, nn.Module) else ():
        if isinstance(each, fx.GraphModule) and has_provenance(each):
            return each
    raise InputError(f"`followers` holds a {type(given).__name__}: {wanted}")


def _shapes(gm: nn.Module) -> dict[str, Any]:
    return {name: p.shape for name, p in gm.named_parameters() if not is_mask_buffer(name)}


def followed(
    held: fx.GraphModule,
    plan: PrunePlan,
    like: fx.GraphModule,
    *,
    masking: bool,
    compensation: Compensation,
    batches: Iterable[Any] | None,
    recalibration: RecalibrateBatchNorm | None,
) -> fx.GraphModule:
    """The follower after the change by which the model became ``like``: the same channels, compensated and recalibrated by
    the follower's own activations. ``held`` is only read.

    Raises:
        RewriteError: its parameters would not be those of the model.
    """
    graph = held
    if compensation.passes:
        measured = measure(held, compensation.needs, batches if compensation.needs else None)
        graph = Pipeline(*compensation.passes).apply(held, Artifacts(measured, plan=plan)).graph_module
    graph = restored(graph, provenance_of(like).added)
    result = (mask if masking else remove)(graph, plan)
    if recalibration is not None:
        result = recalibration(result).graph_module
    if _shapes(result) != _shapes(like):
        raise RewriteError("a follower would not have the parameters of the model: it was made from another graph")
    return result


def restored(gm: fx.GraphModule, added: Sequence[str]) -> fx.GraphModule:
    """A copy with the biases that compensation had added to another graph of this structure; the graph itself if it has them."""
    if set(added) <= set(provenance_of(gm).added):
        return gm
    result = copied(gm)
    restore_biases(result, added)
    return result
