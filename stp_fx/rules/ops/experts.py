"""Products of rows with the matrix of their group, for mixtures of experts: offsets that are data say where a group ends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from stp_fx.rules.call import OpCall
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import edits
from stp_fx.rules.mapping import apply_pattern, weight
from stp_fx.rules.registry import overloads, rule
from stp_fx.rules.samples import arguments

__all__ = ["grouped_mm_of_any_width"]

_MULTIPLE = 8
"""The kernels want rows of whole 16 bytes: 8 numbers of bfloat16, 4 of float32."""


def grouped_mm_of_any_width(
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    *,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``torch.nn.functional.grouped_mm`` for widths that its kernels do not take: filled up with zeros, then cut."""
    inner, outer = -mat_b.shape[-2] % _MULTIPLE, -mat_b.shape[-1] % _MULTIPLE
    wide = torch._grouped_mm(
        F.pad(mat_a, (0, inner)), F.pad(mat_b, (0, outer, 0, inner)), offs=offs, bias=bias, out_dtype=out_dtype
    )
    return wide[..., : mat_b.shape[-1]]


def _widths(edit: Edit) -> None:
    """Rows that are no longer whole 16 bytes are filled up."""
    if edit["mat_a"].dim() == 2 and edit["mat_b"].dim() == 2:
        return  # both are cut along the rows that they share, which stay
    if edit["mat_b"].shape[-2] % _MULTIPLE or edit["mat_b"].shape[-1] % _MULTIPLE:
        edit.node.target = grouped_mm_of_any_width


_DTYPE = torch.bfloat16  # which all of torch's own functions for shapes take
_CALLS = [f for owner, name in ((torch, "_grouped_mm"), (F, "grouped_mm")) if (f := getattr(owner, name, None)) is not None]
_PATTERNS = {
    (2, 3): ("m k, e k n, e, n? -> m n", "m k n"),
    (3, 2): ("e m k, k n, e, n? -> m n", "m k n"),
    (3, 3): ("e m k, e k n, e, n? -> e m n", "e m k n"),
    (2, 2): ("m k, k n, e, n? -> e m n", "m k n"),
}
"""By the ranks of both operands: how their dimensions meet, and whose product is the work."""


def _shape(a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> torch.Tensor:
    """Torch's own refuses numbers that only some devices take, such as float32 off the CPU."""
    rows, columns = a.shape[-2], b.shape[-1]
    if a.dim() == b.dim() == 2:
        shape = (offs.shape[0], rows, columns)
    else:
        shape = (a.shape[0], rows, columns) if a.dim() == b.dim() else (rows, columns)
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


@rule(
    *overloads("aten._grouped_mm.default"),
    calls=[edits(_widths, *_CALLS, grouped_mm_of_any_width, takes="mat_a/self/input mat_b/mat2 offs bias out_dtype")],
    samples={
        "": lambda t: arguments(t(6, 8, dtype=_DTYPE), t(2, 8, 16, dtype=_DTYPE), t.index(2, below=6).int()),
        "matrices": lambda t: arguments(t(2, 4, 8, dtype=_DTYPE), t(2, 8, 16, dtype=_DTYPE)),
    },
    shape=_shape,
    unchecked="its kernels take single precision alone",
)
def _grouped_mm(call: OpCall) -> None:
    a, b, offsets = call["self"], call["mat2"], call["offs"]
    pattern, work = _PATTERNS[a.dim(), b.dim()]
    letters = apply_pattern(call, pattern, [a, b, offsets, call["bias"]], [call.out], roles={1: weight(b.dim() - 1, b.dim() - 2)})
    if offsets is not None:
        if call.numbers_in(offsets, "end") is None:  # of the same axis, since both meet here
            call.pin(letters["e"], "grouped_mm: which rows are whose is data")
        call.pin(letters["m" if a.dim() == 2 else "n"] if a.dim() != b.dim() else (), "grouped_mm: rows go by position")
        call.pin(letters["k"] if a.dim() == b.dim() == 2 else (), "grouped_mm: rows go by position")
    call.contract([letters[k] for k in work.split()], [letters["k"]], 1, [[a, b]])
