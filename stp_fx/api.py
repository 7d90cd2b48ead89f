"""The functions that most programs need; everything they do is a pipeline of passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from stp_fx.analysis.build import analyze
from stp_fx.analysis.cost import Cost
from stp_fx.analysis.cost import cost as _cost
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.names import entries_of
from stp_fx.criteria import Criterion, needs_of, resolve
from stp_fx.errors import InputError
from stp_fx.ir import has_provenance, provenance_of, trace
from stp_fx.passes import (
    MaskChannels,
    Pipeline,
    RemoveChannels,
    ScoreUnits,
    SelectUnits,
)
from stp_fx.passes.collect import collectors_for
from stp_fx.passes.compensate import COMPENSATIONS
from stp_fx.report.compare import compare
from stp_fx.report.report import Report
from stp_fx.report.run_report import RunReport
from stp_fx.report.sweep import Sensitivity, Sweep, sensitivity, sweep
from stp_fx.selection import PrunePlan
from stp_fx.selection.estimate import estimate_keep_ratio

__all__ = [
    "ChannelGraph",
    "Cost",
    "Report",
    "RunReport",
    "Sensitivity",
    "Sweep",
    "analyze",
    "apply_plan",
    "compare",
    "cost",
    "estimate_keep_ratio",
    "plan_of",
    "prune_graph",
    "report_of",
    "sensitivity",
    "sweep",
    "trace",
]


def prune_graph(
    gm: fx.GraphModule | nn.Module,
    criterion: str | Criterion = "magnitude",
    ratio: float = 0.5,
    *,
    example_inputs: Any = None,
    scope: str = "local",
    target: str = "channels",
    calibration: Iterable[Any] | None = None,
    compensation: str | None = None,
    ignore: Iterable[Any] = (),
    ratios: Mapping[str, float] | None = None,
    round_to: int = 1,
    max_ratio: float = 1.0,
    products: str = "auto",
    loss: Any = None,
) -> fx.GraphModule:
    """Removes the least important units; returns a new, smaller GraphModule and leaves ``gm`` as it was.

    Args:
        gm: what :func:`trace` returned; any other module together with ``example_inputs``, with which it is traced.
        criterion: a name (see :func:`stp_fx.criteria.known_criteria`) or a callable ``(group, context) -> scores``.
        ratio: the fraction of the target that goes, in [0, 1).
        scope: "local" (each group loses its share), "global" (groups are compared) or "isomorphic" (groups of the same
            structure are compared, and each structure loses its share).
        target: what ``ratio`` counts: "channels", "macs", "params" or "latency" (as :func:`stp_fx.passes.latency_model`
            predicts it from measurements on this machine). Costs are met within one unit.
        ignore: parameter, axis (``"conv1.weight:0"``) or module names, globs (``"layer*.conv1"``), or modules: what touches them
            stays whole.
        ratios: layer name to a ratio of its own.
        round_to: every group keeps a multiple of so many units.
        max_ratio: no group loses a larger fraction of its units than this.
        products: which factor of an axis like heads x head_dim goes: "outer", "inner", "both", "none" or "auto".
        calibration: batches for criteria that read data: a tensor each, or what a DataLoader yields.
        compensation: None, "mean" (consumers' biases take over the mean of what goes) or "least_squares" (the kept
            channels' weights absorb what they can of it); both read ``calibration``.
        loss: ``loss(gm, batch)``, a scalar, for criteria that read gradients; cross-entropy on ``(input, target)`` if None.

    Raises:
        InputError: an argument out of range or a name that matches nothing.
        TraceError: the module cannot be captured.
        NothingToPruneError: no channel may be removed; says why.
        CriterionError: weights that cannot be scored (integer, NaN).

    Example:
        >>> from torch import nn, randn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> prune_graph(net, ratio=0.5, example_inputs=randn(1, 3, 8, 8)).get_parameter("0.weight").shape
        torch.Size([4, 3, 3, 3])
    """
    if compensation is not None and compensation not in COMPENSATIONS:
        raise InputError(f"unknown compensation {compensation!r}; known: None, 'mean', 'least_squares'")
    if compensation is not None and calibration is None:
        raise InputError(f"compensation {compensation!r} measures activations: give `calibration`, an iterable of batches")
    chosen = resolve(criterion)
    needs = needs_of(chosen) if hasattr(chosen, "needs") or calibration is None else ("statistics",)
    extra, compensate = COMPENSATIONS.get(compensation or "", ((), ()))
    collectors = collectors_for((*needs, *extra), calibration, loss)
    graph = _captured(gm, example_inputs)
    pipeline = Pipeline(
        *collectors,
        ScoreUnits(chosen, entries_of(ignore, "ignore")),
        SelectUnits(ratio, scope, target, ratios, round_to, max_ratio, products),
        *compensate,
        RemoveChannels(),
    )
    return pipeline(graph).graph_module


def apply_plan(gm: fx.GraphModule, plan: PrunePlan, *, mask: bool = False) -> fx.GraphModule:
    """Removes what ``plan`` says (or masks it), without scoring anything; returns a new GraphModule.

    Raises:
        PlanError: the plan does not fit ``gm``; names the axis.
    """
    if not isinstance(plan, PrunePlan):
        raise InputError(f"`plan` is a {type(plan).__name__}; give a PrunePlan (PrunePlan.from_json reads one)")
    rewrite = MaskChannels(plan) if mask else RemoveChannels(plan)
    return rewrite(_captured(gm, None)).graph_module


def plan_of(pruned: fx.GraphModule) -> PrunePlan:
    """What has been removed from a graph since it was captured, in original indices; empty if nothing was."""
    plan = provenance_of(pruned).plan
    return PrunePlan({}, {}) if plan is None else plan


def report_of(pruned: fx.GraphModule) -> RunReport | None:
    """What the last run of :func:`prune_graph` did: groups with their scores, what is pinned and why, totals; ``str``
    gives a table. None for a graph that no selection has pruned or masked."""
    return provenance_of(pruned).report


def cost(gm: fx.GraphModule) -> Cost:
    """MACs and parameters of a captured graph, exactly, without running it; a masked graph counts what is alive."""
    return _cost(gm)


def _captured(gm: Any, example_inputs: Any) -> fx.GraphModule:
    if example_inputs is not None:
        return trace(gm, example_inputs)
    if has_provenance(gm):
        return gm
    if not isinstance(gm, nn.Module):
        raise InputError(f"expected a GraphModule or nn.Module, got {type(gm).__name__}")
    raise InputError(
        f"{type(gm).__name__} has not been traced: call stp_fx.trace(model, example_inputs) first, or pass example_inputs"
    )
