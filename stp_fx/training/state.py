"""The saved state of a run, and whether a saved state can be one of this run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from stp_fx.checks import is_a, is_number, is_whole, shown
from stp_fx.errors import InputError, PlanError
from stp_fx.ir.provenance import provenance_of
from stp_fx.rewrite.removal import mask, remove
from stp_fx.rewrite.slicing import copied
from stp_fx.selection import PrunePlan
from stp_fx.training.followers import restored
from stp_fx.training.regularizers import Regularizer
from stp_fx.training.step import Prepared, without_observers

__all__ = ["VERSION", "check_state", "described", "rebuilt", "structure"]

VERSION = 2
_NOT_OURS = "it is not what state_dict() of a manager gave"


def structure(model: fx.GraphModule) -> dict[str, Any]:
    """Plain data: the removed and the masked channels, and the names of added parameters."""
    state = provenance_of(model)
    return {
        "plan": None if state.plan is None else state.plan.to_json(),
        "masked": None if state.masked is None else state.masked.to_json(),
        "added": list(state.added),
    }


def rebuilt(
    model: fx.GraphModule,
    followers: Sequence[fx.GraphModule],
    state: Mapping[str, Any],
    detached: Regularizer | None,
    device: torch.device | None = None,
) -> Prepared:
    """The structure that ``state`` tells of, carried out on the unpruned model, which is only read; ``detached``: a regularizer
    that had been detached by then; ``device``: of masks, by default that of the parameters.

    Raises:
        StpFxError: the plans do not fit the model.
    """
    plans = {key: None if state[key] is None else PrunePlan.from_json(state[key]) for key in ("plan", "masked")}

    def made_of(gm: fx.GraphModule) -> fx.GraphModule:
        result = restored(gm, state["added"])
        for rewrite, plan in ((remove, plans["plan"]), (functools.partial(mask, device=device), plans["masked"])):
            result = result if plan is None else rewrite(result, plan)
        return copied(gm) if result is gm else result

    start = model if detached is None else without_observers(model, detached)
    return Prepared(made_of(start), plans["plan"] or PrunePlan({}, {}), tuple(map(made_of, followers)))


def described(value: object) -> str:
    """A criterion as text that is the same in another process: without the addresses that functions have."""
    text = repr(value)
    return text if " at 0x" not in text else getattr(value, "__qualname__", type(value).__qualname__)


def check_state(state: object, expected: Mapping[str, Any]) -> None:
    """Refuses what ``state_dict()`` of this run cannot have given; ``expected``: what it gives now.

    Raises:
        InputError: no mapping, missing keys, values of other kinds, another version, schedule, ratio or criterion, or a step that
            does not go with the rest.
    """
    if not is_a(state, Mapping) or "version" not in state:  # type: ignore[operator]
        raise InputError(f"`state` is what state_dict() of a manager gave; got {shown(state)}")
    given: Mapping[str, Any] = state  # type: ignore[assignment]
    if given["version"] != expected["version"]:
        raise InputError(f"the state is of version {shown(given['version'])}; this is version {expected['version']}")
    missing = next((key for key in expected if key not in given), None)
    if missing is not None:
        raise InputError(f"`state` has no entry {missing!r}: {_NOT_OURS}")
    _check_kinds(given)
    kinds = (
        ("unit", "schedule, in"),
        ("epochs", "schedule, with steps at"),
        ("ratios", "schedule or ratio, with the ratios"),
        ("criterion", "criterion,"),
    )
    for key, what in kinds:
        if _plain(given[key]) != _plain(expected[key]):
            raise InputError(f"the state is of another {what} {shown(given[key])}; this manager has {shown(expected[key])}")
    _check_step(given)


def _plain(value: Any) -> Any:
    return list(value) if is_a(value, list, tuple) else value


def _check_kinds(given: Mapping[str, Any]) -> None:
    whole = all(is_whole(given[key]) for key in ("step", "epoch", "count"))
    texts = all(given[key] is None or is_a(given[key], str) for key in ("plan", "masked")) and is_a(given["criterion"], str)
    names = is_a(given["added"], list, tuple) and all(is_a(name, str) for name in given["added"])
    lists = all(is_a(given[key], list, tuple) and all(map(is_number, given[key])) for key in ("epochs", "ratios"))
    if not (whole and texts and names and lists):
        raise InputError(f"`state` holds entries of the wrong kind: {_NOT_OURS}")


def _check_step(given: Mapping[str, Any]) -> None:
    """A step that the rest of the state contradicts."""
    step, steps = given["step"], len(given["epochs"])
    if not 0 <= step <= steps or given["epoch"] < -1 or given["count"] < 0:
        raise InputError(f"`state` is after step {step} of {steps}, epoch {given['epoch']}: {_NOT_OURS}")
    if step and given["plan"] is None and given["masked"] is None:
        raise InputError(f"`state` is after step {step}, and has no channels removed or masked: {_NOT_OURS}")
    for key in ("plan", "masked"):
        if given[key] is not None:
            try:
                PrunePlan.from_json(given[key])
            except (PlanError, InputError) as error:
                raise InputError(f"`state` has no plan in {key!r}: {error}") from error
