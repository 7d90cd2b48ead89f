"""Arguments of the manager that are its own, and the errors for everything that is not one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from stp_fx.analysis.build import analyze
from stp_fx.checks import check_callable, check_whole, is_a, is_whole, shown
from stp_fx.criteria import Criterion, needs_of, resolve
from stp_fx.criteria.auto import check_auto, settled
from stp_fx.errors import InputError, translated
from stp_fx.ir import has_provenance, trace
from stp_fx.ir.sharded import is_sharded
from stp_fx.ir.validation import Validate
from stp_fx.measure.calibration import limited, reiterable
from stp_fx.passes import RecalibrateBatchNorm, RemoveChannels
from stp_fx.passes.compensations import compensation_named
from stp_fx.passes.measure_damage import damage_for
from stp_fx.rewrite.slicing import copied
from stp_fx.selection.selection import Selection
from stp_fx.training.adopt import keep_forward
from stp_fx.training.step import StepPasses

__all__ = ["first_wrapped", "own_graph", "step_passes", "with_regrowth", "wrapped"]


def step_passes(
    model: fx.GraphModule,
    criterion: str | Criterion,
    selection: Selection,
    compensation: str | None,
    recalibrate: int | bool | None,
    train_loader: Iterable[Any] | None,
    calibration_batches: int | None,
    loss: object,
    validate: Validate,
) -> StepPasses:
    """The options of every step, by the manager's arguments of these names.

    Raises:
        InputError: an argument out of range, or data that is needed and not given.
    """
    known = _criterion_for(model, criterion, selection, compensation, train_loader, loss)
    loader = _limited_loader(train_loader, calibration_batches)
    repair = compensation_named(compensation, loader, "train_loader")
    damage = damage_for(selection, compensation, loader, "train_loader")
    needs = (*needs_of(known), *damage.needs, *repair.needs)
    function = check_callable("loss", loss, "(graph, batch) -> scalar")
    number = _checked_recalibration(recalibrate)
    if loader is None and (needs or number):
        raise InputError("the criterion, the compensation or the recalibration reads data: give `train_loader`")
    recalibration = RecalibrateBatchNorm(loader, None if number is True else number) if number and loader is not None else None
    sizes = {group.name: group.size for group in analyze(model).groups}
    return StepPasses(known, needs, repair, damage, loader, function, recalibration, RemoveChannels(validate=validate), sizes)


def with_regrowth(passes: StepPasses, *, mask_until_last: bool, sharded: bool) -> StepPasses:
    """The options of every step, which takes masked units back where others score lower by now.

    Raises:
        InputError: steps remove, or what is measured or repaired has no meaning for a unit that its consumers read as zero.
    """
    if not mask_until_last:
        raise InputError(
            "`regrow` takes masked units back, and with mask_until_last=False every step removes: leave one of them out"
        )
    if sharded:
        raise InputError("`regrow` is not possible for a sharded model: leave it out, or train with DistributedDataParallel")
    if needs_of(passes.criterion) or passes.damage.passes:
        raise InputError(
            f"`regrow` compares masked units with the others, and {passes.criterion!r} or the allocation measures what consumers "
            "read, which is zero for a masked unit: give a criterion that reads weights alone, such as 'magnitude', and "
            "allocation 'scope'"
        )
    if passes.compensation.passes:
        raise InputError(
            "`regrow` takes masked units back, and by then compensation has put their part into other weights: give "
            "compensation=None, or leave `regrow` out"
        )
    return dataclasses.replace(passes, regrow=True)


def _checked_recalibration(recalibrate: int | bool | None) -> int | bool | None:
    """Batches for the recalibration of BatchNorm: True, False, None or a number.

    Raises:
        InputError: anything else.
    """
    if recalibrate is None or is_a(recalibrate, bool) or (is_whole(recalibrate) and recalibrate >= 1):
        return recalibrate
    raise InputError(f"`recalibrate` is a number of batches, at least 1, or True for all; got {shown(recalibrate)}")


def _criterion_for(
    gm: fx.GraphModule,
    criterion: str | Criterion,
    selection: Selection,
    compensation: str | None,
    loader: object,
    loss: object,
) -> Criterion:
    """The criterion of that name, or the given one; "auto" chooses once, for all steps. Training measures BatchNorm's statistics
    again, whether the manager recalibrates them or not.

    Raises:
        InputError: an unknown name, or what contradicts the criterion "auto".
    """
    known = resolve(criterion)
    check_auto(known, compensation, loss=loss)
    there = loader is not None
    return settled(known, gm, data=there, ignore=selection.ignore, compensation=compensation, recalibrated=True)


def _limited_loader(loader: Iterable[Any] | None, number: int | None) -> Iterable[Any] | None:
    """The first ``number`` batches of the loader, at every iteration; all for None.

    Raises:
        InputError: no iterable of batches, or no number of them.
    """
    if number is not None:
        check_whole("calibration_batches", number, 1)
    return None if loader is None else limited(reiterable(loader, "train_loader"), number)


def wrapped(model: fx.GraphModule, wrap: Callable[[nn.Module], nn.Module] | None) -> nn.Module:
    """The model as ``wrap`` returns it; the model itself without ``wrap``.

    Raises:
        InputError: ``wrap`` cannot be called, fails, or gives no module.
    """
    if wrap is None:
        return model

    def failed(said: str) -> str:
        return f"`wrap`, {shown(wrap)}, fails with {said}; give a callable (model) -> module, such as DistributedDataParallel"

    with translated(InputError, failed):
        result = wrap(model)
    if not is_a(result, nn.Module):
        raise InputError(f"`wrap` is a callable (model) -> module; it gave a {type(result).__name__}")
    return result


def first_wrapped(model: fx.GraphModule, wrap: Callable[[nn.Module], nn.Module] | None, *, sharded: bool) -> nn.Module:
    """The result of ``wrap`` for the model that a manager was given; a sharded one is wrapped already.

    Raises:
        InputError: as :func:`wrapped`, or ``wrap`` shards the parameters that the optimizer has.
    """
    if sharded:
        return model
    keep_forward(model)
    result = wrapped(model, wrap)
    if is_sharded(model):
        raise InputError(
            "`wrap` shards the model in place, so an optimizer made before has other parameters: shard the graph first, make the "
            "optimizer, and then the manager, with the same `wrap`"
        )
    return result


def own_graph(gm: fx.GraphModule, example_inputs: Any, validate: Validate, inplace: bool) -> fx.GraphModule:
    """The graph to prune: the given one or a copy of it, traced first where there are example inputs.

    Raises:
        InputError: a module that has not been traced, or a sharded one that is to be copied.
    """
    graph = gm if example_inputs is None else trace(gm, example_inputs, validate=validate)
    if not has_provenance(graph):
        raise InputError("`gm` has not been traced: call stp_fx.trace(model, example_inputs) first, or pass example_inputs")
    if is_sharded(graph) and not inplace:
        raise InputError("`inplace=False` copies the graph, and one that is sharded cannot be copied: leave it out")
    return graph if inplace else copied(graph)
