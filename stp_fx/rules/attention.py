"""Scaled dot-product attention in all its ATen forms.

``b (h r) s d, b h t d, b h t v -> b (h r) s v``: ``r`` query heads share a key/value head (grouped queries); ``r`` is one
in plain attention. Scores are ``b h r s t``, so the cost is ``b h r s t (d + v)``.
"""

from __future__ import annotations

from typing import Any

import torch

from stp_fx.rules.domain import Context
from stp_fx.rules.registry import apply_pattern, rule
from stp_fx.rules.schema import bound, tensors_in

__all__: list[str] = []

PATTERN = "b (h r) s d, b h t d, b h t v -> b (h r) s v"


@rule(
    "aten.scaled_dot_product_attention.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_attention_math.default",
    "aten._scaled_dot_product_attention_math_for_mps.default",
    "aten._scaled_dot_product_fused_attention_overrideable.default",
)
def _attention(ctx: Context, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    values = bound(func, args, kwargs)
    query, key, value = args[:3]
    result = tensors_in(out)[0]
    letters = apply_pattern(ctx, PATTERN, [query, key, value], [result], sizes={"h": int(key.shape[1])})
    mask = values.get("attn_mask", values.get("attn_bias"))
    if isinstance(mask, torch.Tensor):
        _meet_mask(ctx, mask, letters)
    scores = [letters[k] for k in ("b", "h", "r", "s", "t")]
    ctx.inexact(letters["t"], "attention's softmax runs over it")
    ctx.contract([*scores, letters["d"]], [letters["d"]], 1)
    ctx.contract([*scores, letters["v"]], [letters["t"]], 1)


def _meet_mask(ctx: Context, mask: torch.Tensor, letters: Any) -> None:
    scores = [letters["b"], letters["h"] + letters["r"], letters["s"], letters["t"]]
    for k, dim in enumerate(reversed(ctx.dims(mask)), start=1):
        if dim:
            ctx.unify(scores[-k], dim)
