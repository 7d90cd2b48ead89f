"""Plans for checkpoints that do not fit the machine: scores that read one tensor at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx
from typing_extensions import Unpack

from stp_fx.checks import shown
from stp_fx.criteria import Criterion, known_criteria, needs_of, resolve, score
from stp_fx.criteria.auto import Auto
from stp_fx.errors import InputError
from stp_fx.io.checkpoint import Checkpoint
from stp_fx.io.shards import device_named
from stp_fx.ir import provenance_of
from stp_fx.ir.inference_mode import normal_mode
from stp_fx.ir.stamp import stamp_of
from stp_fx.measure.calibration import reiterable
from stp_fx.measure.measured import Measured
from stp_fx.measure.statistics import collect_statistics
from stp_fx.passes import SelectUnits
from stp_fx.passes.artifacts import Artifacts
from stp_fx.paths import path_of
from stp_fx.selection import PrunePlan
from stp_fx.selection.selection import Selection, SelectionOptions, takes_selection

__all__ = ["plan_shards"]


@takes_selection("ratio")
def plan_shards(
    gm: fx.GraphModule,
    source: Any,
    criterion: str | Criterion = "magnitude",
    ratio: float = 0.5,
    *,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **options: Unpack[SelectionOptions],
) -> PrunePlan:
    """The plan that :func:`stp_fx.prune_graph` would make of a network that does not fit into memory; for :func:`prune_shards`.

    Args:
        gm: the unpruned network, as :func:`stp_fx.trace` captured it; it may be on the meta device. Scores are of its dtype.
        source: a checkpoint, as for :func:`prune_shards`; its tensors are read one by one.
        criterion: one that reads weights, such as "magnitude", or means and variances on ``calibration`` ("variance").
        ratio, options: as for :func:`stp_fx.prune_graph`.
        calibration: batches for criteria that read data; for each of them the files are read once, so few large ones are quicker.
        seed: for random criteria.
        device: where the network is run.

    Raises:
        InputError: an argument out of range, a criterion or an allocation that needs the whole network in memory, no batch or one
            that does not fit, or a buffer without numbers (on the meta device, and not in the files).
        NothingToPruneError, TargetError, CriterionError: as for :func:`stp_fx.prune_graph`.
        FileError: ``source`` cannot be read, or does not hold this network.
    """
    provenance_of(gm)
    selection, chosen, place = Selection(ratio, **options), _possible(criterion), device_named(device)
    if selection.allocation == "optimal":
        raise InputError("allocation 'optimal' measures damage on the whole network in memory: give 'scope', or a function")
    needs = needs_of(chosen)
    if needs and calibration is None:
        raise InputError(f"criterion {shown(criterion)} reads data: give `calibration`, an iterable of batches")
    with normal_mode():
        checkpoint = Checkpoint(gm, Path(path_of(source)))
        select = SelectUnits(selection)
        select.requires(gm)
        measured = Measured()
        if needs:
            streamed = checkpoint.streamed(gm, place, checkpoint.__getitem__)
            found = collect_statistics(gm, reiterable(calibration), streamed=streamed)
            measured = Measured(dataclasses.replace(found, stamp=stamp_of(gm)))
        scores = score(gm, chosen, measured, ignore=selection.ignore, seed=seed, tensors=checkpoint)
        return select(gm, Artifacts(measured=measured, scores=scores)).artifacts.planned("plan_shards")


def _possible(criterion: Any) -> Criterion:
    """The criterion, if it reads one tensor at a time, and of data no more than means and variances.

    Raises:
        InputError: it needs more.
    """
    chosen = resolve(criterion)
    if isinstance(chosen, Auto) or not set(needs_of(chosen)) <= {"statistics"}:
        known = [name for name in known_criteria() if name != "auto" and set(needs_of(resolve(name))) <= {"statistics"}]
        raise InputError(
            f"criterion {shown(criterion)} may read covariances or gradients, which need the whole network in memory; shard by "
            f"shard there are {', '.join(map(repr, known))}, and functions of your own that need no others"
        )
    return chosen
