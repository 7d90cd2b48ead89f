"""Pointwise ops need no entry, since torch tags them; these entries work position by position without the tag."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.rules.call import OpCall
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import follows, keeps, modules
from stp_fx.rules.pointwise import pointwise
from stp_fx.rules.registry import overloads, rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

aten = torch.ops.aten

# -- copies and fills ----------------------------------------------------------------------------------------------------


def _same(call: OpCall) -> None:
    """Results have the first operand's factors: copies, casts, dropout, fills."""
    source = call.args[0]
    for tensor in call.outs:
        if tensor.shape == source.shape:
            call.assign(tensor, call.dims(source))


rule(
    *(aten.clone.default, aten.detach.default, aten.alias.default, aten._to_copy.default, aten.detach_.default),
    *(aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default, aten.contiguous.default),
    calls=[keeps("contiguous"), follows("type_as")],
    samples=lambda t: arguments(t(2, 3)),
    keeps_zero=True,
)(_same)
rule(
    *(aten.zero_.default, aten.zeros_like.default, aten.ones_like.default),
    *(aten.rand_like.default, aten.randn_like.default, aten.normal_.default, aten.uniform_.default),
    samples=lambda t: arguments(t(2, 3)),
)(_same)
rule(aten.bernoulli.default, samples=lambda t: arguments(t(2, 3)))(_same)
rule(aten.empty_like.default, samples=lambda t: arguments(t(2, 3)), unchecked="its values are arbitrary")(_same)
rule(aten.bernoulli.p, aten.bernoulli_.float, samples=lambda t: arguments(t(2, 3), 0.5))(_same)
rule(
    aten.native_dropout.default,
    calls=[keeps(F.dropout2d)],
    samples=lambda t: arguments(t(2, 3), 0.5, True),
    keeps_zero=True,
)(_same)
rule(aten.fill_.Scalar, aten.fill.Scalar, aten.full_like.default, samples=lambda t: arguments(t(2, 3), 1.0))(_same)

rule(
    torch.ops.prims.where.default,
    samples=lambda t: arguments(t(2, 3, dtype=torch.bool), t(2, 3), t(2, 3)),
)(pointwise)

# -- several operands ----------------------------------------------------------------------------------------------------


def _prelu(edit: Edit) -> None:
    if edit.module.num_parameters > 1:
        edit.module.num_parameters = edit.size(edit.source[1])


rule(aten.copy_.default, aten.copy.default, samples=lambda t: arguments(t(2, 3), t(2, 3)))(pointwise)
rule(
    aten._prelu_kernel.default,
    calls=[follows(F.prelu), modules(_prelu, nn.PReLU)],
    samples=lambda t: arguments(t(2, 3, 5), t(1, 3, 1)),
)(pointwise)
rule(
    aten.masked_fill.Scalar,
    aten.masked_fill_.Scalar,
    calls=[follows("masked_fill", "masked_fill_", "where")],
    samples=lambda t: arguments(t(2, 3), t(1, 3, dtype=torch.bool), 0.0),
)(pointwise)
rule(
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    samples=lambda t: arguments(t(2, 3), t(1, 3, dtype=torch.bool), t()),
)(pointwise)
rule(
    *overloads("aten.rrelu_with_noise.default"),
    samples=lambda t: arguments(t(2, 3), t(2, 3), 0.1, 0.3),
)(pointwise)
