"""Modules whose forward hides several weights behind one call, spelled out as plain graph nodes.

``nn.MultiheadAttention`` becomes projections, views into heads, attention and the output projection; the transformer layers
become their sublayers (without the fused inference path, which would hide everything in one op). Parameter names survive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stp_fx.errors import TraceError
from stp_fx.ir.proxies import user_line
from stp_fx.ir.train_eval import attention_with_dropout

__all__ = ["lowering_of", "outside_of_tree"]

Lowering = Callable[..., Any]


def lowering_of(module: nn.Module) -> Lowering | None:
    """How to trace through ``module``, or ``None`` if it is kept. Subclasses with their own forward are."""
    for kind, lowering in _LOWERINGS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return None if kind is nn.MultiheadAttention and _rare(module) else lowering
    return None


def outside_of_tree(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module that is no submodule of the model (``nn.ReLU()(y)`` in its forward), which is traced through.

    Raises:
        TraceError: it holds tensors, which the graph would not find.
    """
    held = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    if held:
        raise TraceError(
            f"the forward calls a {type(module).__name__} that is no submodule of the model, and holds {held[0]!r}, at "
            f"{user_line()}: keep it in an attribute, or in a nn.ModuleList"
        )
    return forward


def _rare(attention: Any) -> bool:
    """Options that no known network uses; such a module stays one call, and its channels are pinned."""
    return attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn


def _attention(
    self: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    batched = query.dim() == 3
    q, k, v = _projected(self, query, key, value)
    if not batched:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    elif not self.batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    q, k, v = (_heads(x, self.num_heads, self.head_dim) for x in (q, k, v))
    mask = _mask(attn_mask, key_padding_mask, self.num_heads, batched, q)
    weights = None
    if need_weights:
        out, weights = _explicit(self, q, k, v, mask, average_attn_weights)
        weights = weights if batched else weights.squeeze(0)
    else:
        out = _fused(self, q, k, v, mask, bool(is_causal) and mask is None)
    out = out.transpose(1, 2).flatten(2)
    if not batched:
        out = out.squeeze(0)
    elif not self.batch_first:
        out = out.transpose(0, 1)
    return F.linear(out, self.out_proj.weight, self.out_proj.bias), weights


def _projected(self: nn.MultiheadAttention, query: Any, key: Any, value: Any) -> Any:
    if self._qkv_same_embed_dim and query is key and key is value:
        return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
    if self._qkv_same_embed_dim:
        weights = self.in_proj_weight.chunk(3, 0)
    else:
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
    biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3, 0)
    return tuple(F.linear(x, weights[i], biases[i]) for i, x in enumerate((query, key, value)))


def _heads(x: Any, heads: int, size: int) -> Any:
    return x.view(x.size(0), x.size(1), heads, size).transpose(1, 2)


def _mask(attn_mask: Any, key_padding_mask: Any, heads: int, batched: bool, q: Any) -> Any:
    """One additive mask that broadcasts against [batch, heads, query, key]."""
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q)
        if attn_mask.dim() == 3:
            mask = mask.view(-1, heads, mask.size(1), mask.size(2))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q)
        padding = padding.view(padding.size(0), 1, 1, padding.size(1)) if batched else padding.view(1, 1, 1, padding.size(0))
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Any, q: Any) -> Any:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))


def _explicit(self: nn.MultiheadAttention, q: Any, k: Any, v: Any, mask: Any, average: bool) -> tuple[Any, Any]:
    scores = torch.matmul(q * math.sqrt(1 / self.head_dim), k.transpose(-2, -1))
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1)
    weights = F.dropout(weights, self.dropout, self.training) if self.dropout > 0.0 else weights
    return torch.matmul(weights, v), weights.mean(1) if average else weights


def _fused(self: nn.MultiheadAttention, q: Any, k: Any, v: Any, mask: Any, causal: bool) -> Any:
    """The scale is written out: it stays what it is when the head dimension shrinks."""
    scale = 1 / math.sqrt(self.head_dim)
    if self.dropout == 0.0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    arguments = (q, k, v, mask, causal, scale, self.dropout, self.training)
    return q.tracer.create_proxy("call_function", attention_with_dropout, arguments, {})


def _encoder_layer(
    self: nn.TransformerEncoderLayer, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Any:
    def attend(x: Any) -> Any:
        return self.dropout1(_self_attention(self.self_attn, x, src_mask, src_key_padding_mask, is_causal))

    def feed(x: Any) -> Any:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    if self.norm_first:
        src = src + attend(self.norm1(src))
        return src + feed(self.norm2(src))
    src = self.norm1(src + attend(src))
    return self.norm2(src + feed(src))


def _self_attention(attention: nn.MultiheadAttention, x: Any, mask: Any, padding: Any, is_causal: bool) -> Any:
    return attention(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal)[0]


def _encoder(
    self: nn.TransformerEncoder, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None
) -> Any:
    for layer in self.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
    return src if self.norm is None else self.norm(src)


def _decoder_layer(
    self: nn.TransformerDecoderLayer,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> Any:
    def attend(x: Any) -> Any:
        return self.dropout1(_self_attention(self.self_attn, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal))

    def look(x: Any) -> Any:
        named = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask, "is_causal": memory_is_causal}
        return self.dropout2(self.multihead_attn(x, memory, memory, need_weights=False, **named)[0])

    def feed(x: Any) -> Any:
        return self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    if self.norm_first:
        tgt = tgt + attend(self.norm1(tgt))
        tgt = tgt + look(self.norm2(tgt))
        return tgt + feed(self.norm3(tgt))
    tgt = self.norm1(tgt + attend(tgt))
    tgt = self.norm2(tgt + look(tgt))
    return self.norm3(tgt + feed(tgt))


def _decoder(
    self: nn.TransformerDecoder, tgt: Any, memory: Any, tgt_mask: Any = None, memory_mask: Any = None, **named: Any
) -> Any:
    named["tgt_is_causal"] = bool(named.get("tgt_is_causal"))
    for layer in self.layers:
        tgt = layer(tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, **named)
    return tgt if self.norm is None else self.norm(tgt)


def _transformer(
    self: nn.Transformer,
    src: Any,
    tgt: Any,
    src_mask: Any = None,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    src_key_padding_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    src_is_causal: Any = None,
    tgt_is_causal: Any = None,
    memory_is_causal: bool = False,
) -> Any:
    memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
    return self.decoder(
        tgt,
        memory,
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
        tgt_is_causal=tgt_is_causal,
        memory_is_causal=memory_is_causal,
    )


_LOWERINGS: dict[type[nn.Module], Lowering] = {
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoderLayer: _decoder_layer,
    nn.TransformerDecoder: _decoder,
    nn.Transformer: _transformer,
}
