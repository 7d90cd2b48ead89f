"""Ops that run along a dimension and keep it: softmax and cumulative sums."""

from __future__ import annotations

import math

import torch

from stp_fx.rules.call import OpCall
from stp_fx.rules.registry import overloads, rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

aten = torch.ops.aten


def _runs_along(call: OpCall) -> None:
    dims = call.dims(call["self"])
    if dims:
        at, reason = call["dim"] % len(dims), f"{call.name.strip('_')} runs over it"
        weighs = "softmax" in call.name and call.excludes(call["self"], at, -math.inf, 0, reason)
        if not weighs:
            call.inexact(dims[at], reason)
    call.assign(call.out, dims)


rule(aten._softmax.default, aten._log_softmax.default, samples=lambda t: arguments(t(2, 6, 5), 1, False))(_runs_along)
rule(
    *overloads("aten._safe_softmax.default"),
    samples=lambda t: arguments(t(2, 6, 5), 1),
    shape=lambda x, *_, **__: torch.empty_like(x),
)(_runs_along)
rule(aten.cumprod.default, aten.logcumsumexp.default, samples=lambda t: arguments(t(2, 6, 5), 1))(_runs_along)


@rule(aten.cumsum.default, samples=lambda t: arguments(t(2, 6, 5), 1))
def _cumsum(call: OpCall) -> None:
    """A removed position adds nothing to the later ones: as a sum, it reads zero there."""
    dims = call.dims(call["self"])
    if dims:
        call.contract((), [dims[call["dim"] % len(dims)]], 0)
    counted = call.numbers_in(call["self"], "count")
    if counted is not None:
        call.state_numbers(call.out, counted, "end")
    call.assign(call.out, dims)
