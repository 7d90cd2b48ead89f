"""Reductions: sums and norms read zero where a position is removed; means, extrema and variances are taken over fewer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from stp_fx.rules.call import OpCall, dim_list
from stp_fx.rules.domain import Dim, dim_size, has_ids
from stp_fx.rules.literals import follows, keeps
from stp_fx.rules.registry import overloads, rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

aten = torch.ops.aten


def _reduce(call: OpCall, state: Callable[[Dim], None]) -> None:
    dims = call.dims(call.args[0])
    reduced = dim_list(call.get("dim"), len(dims))
    for k in reduced:
        if has_ids(dims[k]):
            state(dims[k])
    if call.get("keepdim"):
        result = tuple(() if k in reduced else dim for k, dim in enumerate(dims))
    else:
        result = tuple(dim for k, dim in enumerate(dims) if k not in reduced)
    for tensor in call.outs:
        call.assign(tensor, result)


def _sum(call: OpCall) -> None:
    """Zeros are neutral, except to a norm of negative order, which the smallest entries lead."""
    order = call.get("ord", call.get("p"))
    if isinstance(order, (int, float)) and order < 0:
        _mean(call)
    else:
        _reduce(call, lambda dim: call.contract((), [dim], 0))


def _mean(call: OpCall) -> None:
    """The result depends on how many positions there are, or on zeros among them."""
    _reduce(call, lambda dim: call.inexact(dim, f"{call.name} reduces over it"))


def _variance(call: OpCall) -> None:
    """As a mean; an unbiased one divides by one less than the number of positions, so of a dimension reduced alone two stay."""
    _mean(call)
    dims = call.dims(call["self"])
    given = call.get("correction", 1)
    least = 1 + int(1 if given is None else given)
    reduced = dim_list(call.get("dim"), len(dims))
    others = [k for k in reduced if not has_ids(dims[k]) and dim_size(dims[k]) > 1]
    for k in reduced if least > 1 and not others else ():
        if has_ids(dims[k]):
            call.several(dims[k], least)


def _extremum(call: OpCall) -> None:
    """The second result holds positions along the dimension, so it must keep its numbering."""
    _reduce(call, lambda dim: call.pin(dim, f"{call.func.__name__} gives positions along it"))


rule(
    aten.sum.default,
    aten.nansum.default,
    aten.any.default,
    aten.norm.Scalar,
    calls=[keeps(torch.cosine_similarity, F.cosine_similarity)],
    samples=lambda t: arguments(t(2, 6)),
    keeps_zero=True,
)(_sum)
rule(aten.sum.dim_IntList, samples=lambda t: arguments(t(2, 6, 5), [1], True), keeps_zero=True)(_sum)
rule(
    *overloads("aten.any.dims", "aten.count_nonzero.dim_IntList"),
    samples=lambda t: arguments(t(2, 6, 5), [1]),
    keeps_zero=True,
)(_sum)
rule(
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
    calls=[follows(F.normalize)],
    samples=lambda t: arguments(t(2, 6, 5), 2.0, [1]),
    keeps_zero=True,
)(_sum)
rule(aten.any.dim, samples=lambda t: arguments(t(2, 6, 5), 1), keeps_zero=True)(_sum)

rule(aten.mean.default, samples=lambda t: arguments(t(2, 6)), keeps_zero=True)(_mean)
rule(aten.mean.dim, samples=lambda t: arguments(t(2, 6, 5), [1], True), keeps_zero=True)(_mean)
rule(
    *(aten.max.default, aten.min.default, aten.prod.default, aten.all.default),
    samples=lambda t: arguments(t(2, 6)),
)(_mean)
rule(
    *(aten.amax.default, aten.amin.default, aten.logsumexp.default),
    samples=lambda t: arguments(t(2, 6, 5), [1], True),
)(_mean)
rule(
    *(aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction),
    samples=lambda t: arguments(t(2, 6, 5), [1]),
)(_variance)
rule(aten.all.dim, aten.prod.dim_int, samples=lambda t: arguments(t(2, 6, 5), 1))(_mean)
rule(aten.median.default, samples=lambda t: arguments(t(2, 6)))(_extremum)
rule(aten.max.dim, aten.min.dim, aten.median.dim, samples=lambda t: arguments(t(2, 6, 5), 1))(_extremum)
