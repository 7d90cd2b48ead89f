"""Arguments of the manager that are its own, and the errors for everything that is not one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx, nn

from stp_fx.checks import check_whole, is_a, is_whole, listed_argument, shown
from stp_fx.criteria import Criterion, resolve
from stp_fx.criteria.auto import check_auto, settled
from stp_fx.errors import InputError, translated
from stp_fx.ir.provenance import has_provenance
from stp_fx.measure.calibration import limited, reiterable
from stp_fx.selection.selection import Selection

__all__ = ["check_state", "checked_recalibration", "criterion_for", "limited_loader", "listed_followers", "wrapped"]


def checked_recalibration(recalibrate: int | bool | None) -> int | bool | None:
    """Batches for the recalibration of BatchNorm: True, False, None or a number.

    Raises:
        InputError: anything else.
    """
    if recalibrate is None or is_a(recalibrate, bool) or (is_whole(recalibrate) and recalibrate >= 1):
        return recalibrate
    raise InputError(f"`recalibrate` is a number of batches, at least 1, or True for all; got {shown(recalibrate)}")


def criterion_for(
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


def limited_loader(loader: Iterable[Any] | None, number: int | None) -> Iterable[Any] | None:
    """The first ``number`` batches of the loader, at every iteration; all for None.

    Raises:
        InputError: no iterable of batches, or no number of them.
    """
    if number is not None:
        check_whole("calibration_batches", number, 1)
    return None if loader is None else limited(reiterable(loader, "train_loader"), number)


def listed_followers(followers: object) -> tuple[fx.GraphModule, ...]:
    """Further graphs as a tuple.

    Raises:
        InputError: one graph in place of a list, or something that is no traced graph.
    """
    wanted = "give a list of graphs of the same structure, [averaged.module]"
    found = listed_argument("followers", () if is_a(followers, tuple) and not followers else followers, wanted)
    for each in found:
        if not is_a(each, fx.GraphModule) or not has_provenance(each):
            raise InputError(f"`followers` holds a {type(each).__name__}: {wanted}")
    return found


def wrapped(model: fx.GraphModule, wrap: Callable[[nn.Module], nn.Module] | None) -> nn.Module:
    """What ``wrap`` makes of the model; the model itself without it.

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


def check_state(state: object, expected: Mapping[str, Any]) -> None:
    """Refuses what no manager's ``state_dict()`` can have given.

    Raises:
        InputError: no mapping, other keys, or values of other kinds.
    """
    if not is_a(state, Mapping) or "version" not in state:  # type: ignore[operator]
        raise InputError(f"`state` is what state_dict() of a manager gave; got {shown(state)}")
    given: Mapping[str, Any] = state  # type: ignore[assignment]
    if given["version"] != expected["version"]:
        return  # the caller says so
    missing = next((key for key in expected if key not in given), None)
    if missing is not None:
        raise InputError(f"`state` has no entry {missing!r}: it is not what state_dict() of a manager gave")
    whole = all(is_whole(given[key]) for key in ("step", "epoch"))
    texts = all(given[key] is None or is_a(given[key], str) for key in ("plan", "masked"))
    names = is_a(given["added"], list, tuple) and all(is_a(name, str) for name in given["added"])
    if not (whole and texts and names and is_a(given["epochs"], list, tuple)):
        raise InputError("`state` holds entries of the wrong kind: it is not what state_dict() of a manager gave")
