"""The functions that most programs need; everything they do is a pipeline of passes."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn
from typing_extensions import Unpack

from stp_fx.analysis.blocks import Block, blocks_of
from stp_fx.analysis.build import analyze
from stp_fx.analysis.cost import Cost, cost
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.names import entries_of
from stp_fx.checks import arguments_by_name, check_callable, check_flag, is_a, is_choice, shown
from stp_fx.criteria import Criterion, needs_of, resolve
from stp_fx.criteria.auto import check_auto, settled
from stp_fx.errors import FunctionChangedError, InputError, NothingToPruneError
from stp_fx.ir import has_provenance, provenance_of, trace
from stp_fx.ir.inference_mode import normal_mode
from stp_fx.ir.trace import FRONT_ENDS
from stp_fx.ir.validation import Validate, Validation
from stp_fx.measure.calibration import reiterable, watched
from stp_fx.measure.gradients import Loss
from stp_fx.measure.measured import reading_for
from stp_fx.passes import (
    CollectGradients,
    CollectStatistics,
    GraphPass,
    MaskChannels,
    Pipeline,
    RecalibrateBatchNorm,
    RemoveChannels,
    ScoreUnits,
    SelectUnits,
)
from stp_fx.passes.bases import BasisName, in_basis
from stp_fx.passes.compensations import CompensationName, compensation_named
from stp_fx.passes.measure_damage import damage_for
from stp_fx.passes.reporting import CHANGES, pinned_in_report
from stp_fx.progress import Progress
from stp_fx.report.compare import compare
from stp_fx.report.report import Report
from stp_fx.report.run_report import RunReport
from stp_fx.report.sweep import Sensitivity, Sweep, sensitivity, sweep
from stp_fx.selection import PrunePlan
from stp_fx.selection.block_scores import score_blocks
from stp_fx.selection.estimate import estimate_keep_ratio
from stp_fx.selection.selection import Selection, SelectionOptions, takes_selection
from stp_fx.text import listed

__all__ = [
    "Block",
    "ChannelGraph",
    "Cost",
    "Report",
    "RunReport",
    "Selection",
    "Sensitivity",
    "Sweep",
    "Validation",
    "analyze",
    "apply_plan",
    "blocks_of",
    "compare",
    "cost",
    "estimate_keep_ratio",
    "plan_of",
    "prune_graph",
    "report_of",
    "score_blocks",
    "sensitivity",
    "sweep",
    "trace",
]

_log = logging.getLogger("stp_fx.validate")


@takes_selection("ratio")
def prune_graph(
    gm: fx.GraphModule | nn.Module,
    criterion: str | Criterion = "magnitude",
    ratio: float = 0.5,
    *,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    frontend: str = "auto",
    outputs: str | int | Sequence[str | int] | None = None,
    calibration: Iterable[Any] | None = None,
    compensation: CompensationName | None = None,
    recalibrate: int | bool | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    validate: Validate = "auto",
    basis: BasisName | None = None,
    progress: Progress = None,
    **options: Unpack[SelectionOptions],
) -> fx.GraphModule:
    """Removes the least important units; returns a new, smaller GraphModule, and changes nothing in ``gm``.

    Args:
        gm: a graph that :func:`trace` returned; any other module together with ``example_inputs``, with which it is traced.
        criterion, seed: a name ("auto": see :class:`stp_fx.criteria.Auto`) or ``(group, context) -> scores``; its seed if random.
        ratio: the fraction of the target that is removed, in [0, 1).
        example_inputs, kwargs, frontend, outputs: as for :func:`trace`, for a module that has not been traced.
        calibration: batches for criteria, compensation and recalibration: a tensor each, or the batches of a DataLoader.
        compensation: None, "mean", "least_squares", "sequential" (refits layers), "blockwise", "distillation" (trains them).
        recalibrate: batches of ``calibration`` on which BatchNorm's statistics are measured again after the removal (True: all).
        loss: ``loss(gm, batch)``, a scalar, for criteria that read gradients; cross-entropy on ``(input, target)`` if None.
        validate: runs the result beside the masked graph, and the capture beside the module: "auto" (10 runs, 30 s), True, False.
        basis: "rotate" first turns streams into principal components (on ``calibration`` if given), heads into singular vectors.
        progress: None (a bar on a terminal), True (a bar everywhere), False, or ``(work, done, total) -> Any`` for every step.
        options: the other fields of :class:`Selection`, such as ``scope`` ("local", "global", "isomorphic"), ``target``
            ("channels", "macs", "params", "latency", "memory") and ``allocation`` ("scope", or "optimal": by measured damage).

    Raises:
        InputError: an argument out of range or a name that matches nothing; found before any batch is read.
        TraceError: the module cannot be captured.
        NothingToPruneError: no channel may be removed; the message has the reasons.
        TargetError: a cost that cannot be met; the message names the cost in reach.
        CriterionError: weights that cannot be scored (integer, NaN).
        FunctionChangedError: removing groups that `ratios` names changes the function.
        NothingToRotateError: neither a residual stream nor a head allows another basis; the message says why.

    Example:
        >>> from torch import nn, randn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> prune_graph(net, ratio=0.5, example_inputs=randn(1, 3, 8, 8)).get_parameter("0.weight").shape
        torch.Size([4, 3, 3, 3])
    """
    selection, data = Selection(ratio, **options), watched(calibration, progress)
    made = functools.partial(
        pruning_pipeline, criterion, selection, calibration=data, compensation=compensation, recalibrate=recalibrate, loss=loss,
        seed=seed, rewrite=RemoveChannels(validate=validate),
    )  # fmt: skip
    made()  # refuses what does not fit before anything is traced
    with normal_mode():
        captured = _captured(gm, example_inputs, kwargs, frontend, validate, outputs)
        return _without_guilty(made, selection, in_basis(captured, basis, data))


def _without_guilty(made: Callable[[fx.GraphModule], Pipeline], selection: Selection, gm: fx.GraphModule) -> fx.GraphModule:
    """Runs the pipeline made for ``gm``; while its removal changes the function, again without the groups that are why."""
    pipeline = made(gm)
    pinned: tuple[str, ...] = ()
    guilty: FunctionChangedError | None = None
    while True:
        try:
            result = pipeline(gm).graph_module
        except FunctionChangedError as error:
            new = tuple(name for name in error.groups if name not in pinned)
            if not new:
                raise
            guilty, pinned = error, (*pinned, *new)
            _log.warning("planning again, since %s", error)
        except InputError as error:
            if guilty is None:
                raise
            raise guilty from error
        except NothingToPruneError as error:
            if guilty is None:
                raise
            raise NothingToPruneError(f"{error}; {CHANGES}: {listed(pinned, 6)}") from error
        else:
            return pinned_in_report(result, analyze(gm), pinned) if pinned else result
        without = dataclasses.replace(selection, ignore=(*entries_of(selection.ignore, "ignore"), *pinned))
        pipeline = Pipeline(*(SelectUnits(without) if isinstance(p, SelectUnits) else p for p in pipeline.passes))


def pruning_pipeline(
    criterion: str | Criterion,
    selection: Selection,
    gm: fx.GraphModule | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    compensation: str | None = None,
    recalibrate: int | bool | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    rewrite: GraphPass | None = None,
) -> Pipeline:
    """The passes that :func:`prune_graph` runs; ``rewrite`` is the last but for recalibration (default: removal). With ``gm``,
    the criterion "auto" is the one that it chooses for this graph.

    Raises:
        InputError: an unknown name, a number out of range, or data that is needed and not given.
    """
    chosen = resolve(criterion)
    check_callable("loss", loss, "(graph, batch) -> scalar")
    data = None if calibration is None else reiterable(calibration)
    again = recalibrate is not None and recalibrate is not False
    repair = compensation_named(compensation, data)
    check_auto(chosen, compensation, loss=loss)
    if gm is not None:
        there = data is not None
        chosen = settled(chosen, gm, data=there, ignore=selection.ignore, compensation=compensation, recalibrated=again)
    damage = damage_for(selection, compensation, data)
    needs = needs_of(chosen) if hasattr(chosen, "needs") or calibration is None else ("statistics",)
    reading = reading_for((*needs, *damage.needs, *repair.needs), data)
    collect: list[GraphPass] = []
    if data is not None and reading.statistics is not None:
        collect.append(CollectStatistics(data, **reading.statistics))
    if data is not None and reading.gradients is not None:
        collect.append(CollectGradients(data, loss, **reading.gradients))
    last = [RemoveChannels() if rewrite is None else rewrite]
    if recalibrate is not None and again:
        last.append(_recalibration(data, recalibrate))
    score_units = ScoreUnits(chosen, selection.ignore, seed)
    return Pipeline(*collect, score_units, *damage.passes, SelectUnits(selection), *repair.passes, *last)


def _recalibration(data: Iterable[Any] | None, recalibrate: int | bool) -> GraphPass:
    if data is None:
        raise InputError("`recalibrate` measures BatchNorm's statistics: give `calibration`, an iterable of batches")
    return RecalibrateBatchNorm(data, None if recalibrate is True else recalibrate)


def apply_plan(gm: fx.GraphModule, plan: PrunePlan, *, mask: bool = False, validate: Validate = "auto") -> fx.GraphModule:
    """Removes the blocks that ``plan`` names and the channels that it leaves out (or masks them), without scoring anything; gives
    a new GraphModule.

    ``validate``: whether a removal is run beside the masked graph and compared, as for :func:`prune_graph`.

    Raises:
        InputError: ``gm`` is not a graph that :func:`trace` captured, or ``plan`` is not a PrunePlan.
        PlanError: the plan does not fit ``gm``; names the axis.
        FunctionChangedError: removing these channels is not masking them, as a run shows; names the groups.
    """
    if not is_a(plan, PrunePlan):
        raise InputError(f"`plan` is a {type(plan).__name__}; give a PrunePlan (PrunePlan.from_json reads one)")
    provenance_of(gm)
    check_flag("mask", mask)
    return (MaskChannels(plan) if mask else RemoveChannels(plan, validate))(gm).graph_module


def plan_of(pruned: fx.GraphModule) -> PrunePlan:
    """The plan of all removals since a graph was captured, in original indices; empty if nothing was removed.

    Raises:
        InputError: ``pruned`` is not a graph that :func:`trace` captured.
    """
    plan = provenance_of(pruned).plan
    return PrunePlan({}, {}) if plan is None else plan


def report_of(pruned: fx.GraphModule) -> RunReport | None:
    """The report of the selection that made this graph: groups with their scores, pinned axes with reasons, totals; ``str``
    gives a table. None for a graph that no selection has pruned or masked, such as one that :func:`apply_plan` made.

    Raises:
        InputError: ``pruned`` is not a graph that :func:`trace` captured.
    """
    return provenance_of(pruned).report


def _captured(
    gm: Any, example_inputs: Any, kwargs: Mapping[str, Any] | None, frontend: str, validate: Validate, outputs: Any
) -> fx.GraphModule:
    if not isinstance(gm, nn.Module):
        raise InputError(f"expected a GraphModule or nn.Module, got a {type(gm).__name__}")
    named = arguments_by_name(kwargs)
    if example_inputs is not None or named:
        return trace(gm, example_inputs, kwargs=named, frontend=frontend, validate=validate, outputs=outputs)
    if isinstance(gm, fx.GraphModule) and has_provenance(gm):
        if not is_choice(frontend, FRONT_ENDS):
            raise InputError(f"unknown front end {shown(frontend)}; known: {', '.join(FRONT_ENDS)}")
        if outputs is not None:
            raise InputError("`outputs` chooses what a capture gives, and this graph is captured: give it to stp_fx.trace")
        return gm
    raise InputError(
        f"{type(gm).__name__} has not been traced: call stp_fx.trace(model, example_inputs) first, or pass example_inputs"
    )
