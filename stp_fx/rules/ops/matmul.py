"""Matrix products and distances."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.rules.call import OpCall
from stp_fx.rules.domain import Dim
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import follows, modules
from stp_fx.rules.mapping import BIAS, weight
from stp_fx.rules.registry import rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

aten = torch.ops.aten


def _addmm_shape(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **_: Any) -> torch.Tensor:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or bias.shape[-1:] not in (b.shape[1:], (1,)):
        raise RuntimeError(f"addmm: {tuple(bias.shape)} + {tuple(a.shape)} @ {tuple(b.shape)} do not fit")
    return a.new_empty((a.shape[0], b.shape[1]))


def _linear(edit: Edit) -> None:
    edit.module.in_features = edit.size(edit.source[-1])
    edit.module.out_features = edit.size(edit.result_dims()[-1])


rule(
    aten.mm.default,
    pattern="m k, k n -> m n",
    roles={0: weight(0, 1), 1: weight(1, 0)},  # aten.t leaves a Linear's weight as [in, out]
    calls=[follows(torch.matmul, torch.mm, torch.einsum, torch.tensordot, operator.matmul, "matmul", "__matmul__", "mm")],
    samples=lambda t: arguments(t(2, 3), t(3, 5)),
)

rule(
    aten.addmm.default,
    pattern="m? n?, m k, k n -> m n",
    roles={0: BIAS, 1: weight(0, 1), 2: weight(1, 0)},
    calls=[follows(torch.addmm, F.linear), modules(_linear, nn.Linear)],
    samples=lambda t: arguments(t(5), t(2, 3), t(3, 5)),
    shape=_addmm_shape,
)

rule(
    aten._sparse_addmm.default,  # torch.sparse.mm; analysed as of dense matrices
    pattern="m? n?, m k, k n -> m n",
    cost=0,  # it multiplies as many numbers as the sparse matrix has, which a shape does not tell
    calls=[follows(torch.sparse.mm)],
    unchecked="its matrix is sparse",
    samples=lambda t: arguments(t(2, 5), t(2, 3), t(3, 5)),
)

rule(
    aten.bmm.default,
    pattern="b m k, b k n -> b m n",
    roles={0: weight(1, 2), 1: weight(2, 1)},
    calls=[follows(torch.bmm, "bmm")],
    samples=lambda t: arguments(t(2, 3, 5), t(2, 5, 7)),
)

rule(
    aten.baddbmm.default,
    pattern="b? m? n?, b m k, b k n -> b m n",
    roles={0: BIAS, 1: weight(1, 2), 2: weight(2, 1)},
    calls=[follows(torch.baddbmm)],
    samples=lambda t: arguments(t(2, 3, 7), t(2, 3, 5), t(2, 5, 7)),
)

rule(
    aten.mv.default,
    pattern="m k, k -> m",
    roles={0: weight(0, 1)},
    calls=[follows(torch.mv)],
    samples=lambda t: arguments(t(2, 3), t(3)),
)

rule(
    aten.dot.default,
    aten.vdot.default,
    pattern="k, k -> ",
    calls=[follows(torch.dot)],
    samples=lambda t: arguments(t(3), t(3)),
)

rule(
    aten._cdist_forward.default,
    pattern=".. m k, .. n k -> .. m n",
    cost=0,  # no multiply-accumulates
    distance=True,
    calls=[follows(torch.cdist)],
    samples=lambda t: arguments(t(2, 3, 5), t(2, 7, 5), 2.0, None),
)

rule(
    aten._euclidean_dist.default,
    pattern=".. m k, .. n k -> .. m n",
    cost=0,
    distance=True,
    samples=lambda t: arguments(t(3, 5), t(7, 5)),
)


def _bilinear(edit: Edit) -> None:
    edit.module.in1_features = edit.size(edit.operand("input1").dims[-1])
    edit.module.in2_features = edit.size(edit.operand("input2").dims[-1])
    edit.module.out_features = edit.size(edit.result_dims()[-1])


@rule(
    aten._trilinear.default,
    calls=[follows(F.bilinear, torch.outer), modules(_bilinear, nn.Bilinear, takes="input1 input2")],
    samples=lambda t: arguments(t(2, 3), t(5, 3, 7), t(2, 7), [1, 3], [0], [1, 2], [2, 3]),
)
def _trilinear(call: OpCall) -> None:
    """``sum over sumdim of i1 * i2 * i3``, each with dimensions of size one put in: nn.Bilinear."""
    tensors = [call["i1"], call["i2"], call["i3"]]
    expanded: list[list[Dim]] = []
    for tensor, expand in zip(tensors, [call["expand1"], call["expand2"], call["expand3"]], strict=True):
        dims = list(call.dims(tensor))
        for position in sorted(expand):
            dims.insert(position, ())
        expanded.append(dims)
    joined: list[Dim] = []
    for column in zip(*expanded, strict=True):
        present = [dim for dim in column if dim]
        dim = present[0] if present else ()
        for other in present[1:]:
            dim = call.unify(dim, other)
        joined.append(dim)
    summed = call["sumdim"]
    carriers = [[t for t, dims in zip(tensors, expanded, strict=True) if dims[k]] for k in summed]
    call.reads(tensors[1], "weight", 0, None)
    call.contract(joined, [joined[k] for k in summed], 1, carriers)
    call.assign(call.out, tuple(dim for k, dim in enumerate(joined) if k not in summed))
