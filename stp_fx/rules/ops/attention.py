"""Scaled dot-product attention in all its ATen forms.

``r`` query heads share a key/value head (grouped queries); ``r`` is one in plain attention. Scores are ``b h r s t``, so the
cost is ``b h r s t (d + v)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from stp_fx.ir.train_eval import attention_with_dropout
from stp_fx.rules.domain import dim_size
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import PythonCalls, edits, follows
from stp_fx.rules.mapping import tensor_arguments, tensor_results
from stp_fx.rules.registry import overloads, rule
from stp_fx.rules.samples import Make, Sample, arguments

__all__: list[str] = []

aten = torch.ops.aten

_QKV = "b (h r) s d, b h t d, b h t v"
_MASK = "b? (h r)? s? t?"
_PRODUCTS = ("b h r s t d over d", "b h r s t v over t")


def _scale(edit: Edit) -> None:
    """The default scale depends on the head dimension: it stays what it was."""
    if edit.changed(edit.source[-1]) and edit.get("scale") is None:
        edit.set("scale", 1 / math.sqrt(dim_size(edit.source[-1])))


_CALLS = (
    edits(_scale, F.scaled_dot_product_attention, takes="query key value attn_mask dropout_p is_causal scale enable_gqa"),
    follows(attention_with_dropout),
)


def _attention(*ops: Any, samples: Sample, calls: Sequence[PythonCalls] = (), cpu: bool = True) -> None:
    """Forms with one kind of arguments; what they give beside the first result carries no channels."""
    for op in ops:
        names = [name for _, name in tensor_arguments(op)]
        more = [_MASK if name in ("attn_mask", "attn_bias") else "*" for name in names[3:]]
        rule(
            op,
            pattern=f"{', '.join([_QKV, *more])} -> {', '.join(['b (h r) s v', *'*' * (len(tensor_results(op)) - 1)])}",
            products=_PRODUCTS,
            inexact={"t": "attention's softmax runs over it"},
            calls=calls,
            samples=samples,
            unchecked="" if cpu else "no CPU kernel",
        )


def _qkv(t: Make) -> tuple[torch.Tensor, ...]:
    return t(2, 4, 3, 8), t(2, 4, 5, 8), t(2, 4, 5, 8)


def _plain(t: Make):
    return arguments(*_qkv(t))


def _grouped(t: Make):
    return arguments(t(2, 4, 3, 8), t(2, 2, 5, 8), t(2, 2, 5, 8), enable_gqa=True)


def _with_mask(*more: Any) -> Sample:
    return lambda t: arguments(*_qkv(t), t(2, 4, 3, 5), *more)


_attention(aten.scaled_dot_product_attention.default, samples=_grouped, calls=_CALLS)
_attention(
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_attention_math.default,
    samples=_plain,
)
_attention(
    *overloads("aten._scaled_dot_product_attention_math_for_mps.default", "aten._scaled_dot_product_flash_attention.default"),
    samples=_plain,
    cpu=False,
)
_attention(
    *overloads("aten._scaled_dot_product_efficient_attention.default", "aten._scaled_dot_product_cudnn_attention.default"),
    samples=_with_mask(False),
    cpu=False,
)
_attention(*overloads("aten._scaled_dot_product_fused_attention_overrideable.default"), samples=_with_mask(), cpu=False)
