"""The result of each ATen op when some of the values that it reads are absent (NaN); see :mod:`stp_fx.testing.absent`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["CARRIES", "LIKE", "NAN", "POINTWISE", "SEMANTICS", "is_inexact", "marked", "pointwise", "tensors_in"]

NAN = float("nan")
_LOSS_OWN = ("self", "target", "reduction")


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in a nest of mappings, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_in(item)]
    return []


def is_inexact(tensor: torch.Tensor) -> bool:
    """Whether a tensor can hold NaN."""
    return tensor.is_floating_point() or tensor.is_complex()


def _names(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


CARRIES = _names(
    "view _unsafe_view _reshape_alias reshape permute transpose transpose_ t unsqueeze unsqueeze_ squeeze squeeze_ expand",
    "slice select split split_with_sizes unsafe_split unsafe_split_with_sizes unbind cat stack flip roll constant_pad_nd",
    "repeat index_select index _unsafe_index gather embedding diagonal as_strided unfold glu",
    "clone detach alias lift_fresh _to_copy copy_ contiguous fill_ zero_ new_zeros new_ones new_empty new_full",
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im grid_sampler_2d",
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training",
    "_batch_norm_with_update _batch_norm_no_update",
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d",
    "adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d",
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d",
    "upsample_bicubic2d upsample_trilinear3d reflection_pad1d reflection_pad2d reflection_pad3d",
    "replication_pad1d replication_pad2d replication_pad3d",
    "_fft_r2c _fft_c2r _fft_c2c view_as_complex view_as_real complex _conj resolve_conj",
    "index_add index_copy index_reduce roi_align roi_pool",
)
"""Ops that move positions, or work inside one channel: NaN stays where it belongs."""

POINTWISE = _names(
    "_prelu_kernel hardswish hardswish_ hardsigmoid hardtanh hardtanh_ log_sigmoid_forward softplus masked_fill masked_fill_",
    "polar",
)
"""Pointwise ops that torch does not tag."""

LIKE = _names("zeros_like ones_like full_like empty_like rand_like randn_like native_dropout bernoulli")
"""Results that take only their shape from an operand."""


def marked(out: Any, gone: torch.Tensor) -> Any:
    """``out`` with NaN where ``gone``."""
    for tensor in tensors_in(out):
        if is_inexact(tensor) and tensor.shape == gone.shape:
            tensor.masked_fill_(gone, NAN)
    return out


def pointwise(func: Any, args: Any, kwargs: Any, floats: list[torch.Tensor]) -> Any:
    """A result is absent where any operand is, also under ``where`` and ``clamp``, which may drop NaN."""
    gone = torch.zeros((), dtype=torch.bool)
    for tensor in floats:
        gone = gone | tensor.isnan()
    out = func(*args, **kwargs)
    for tensor in tensors_in(out):
        if is_inexact(tensor):
            tensor.masked_fill_(gone.expand(tensor.shape), NAN)
    return out


# -- reductions --------------------------------------------------------------------------------------------------------


def _reduce(
    x: torch.Tensor,
    dims: Any,
    keepdim: bool,
    empty: float,
    reduce: Callable[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor],
) -> torch.Tensor:
    """``reduce(x with absent = empty, count of present, dims)`` with kept dimensions; absent where nothing is present."""
    along = list(range(x.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    count = (~x.isnan()).sum(along, keepdim=True)
    out = reduce(x.masked_fill(x.isnan(), empty), count, along).masked_fill(count == 0, NAN)
    return out if keepdim else out.reshape([s for k, s in enumerate(out.shape) if k not in {d % x.dim() for d in along}])


def _plain(empty: float, function: Callable[..., torch.Tensor]) -> Callable[[Any, Any, Any], Any]:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = _bound(func, args, kwargs)
        return _reduce(args[0], given.get("dim"), given.get("keepdim", False), empty, lambda x, n, d: function(x, d, True))

    return run


def _extremum(empty: float) -> Callable[[Any, Any, Any], Any]:
    """``max`` and ``min`` over everything, or along one dimension with the positions."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        gone = args[0].isnan()
        out = func(args[0].masked_fill(gone, empty), *args[1:], **kwargs)
        if isinstance(out, torch.Tensor):
            return out
        keepdim = _bound(func, args, kwargs).get("keepdim", False)
        return out[0].masked_fill(gone.all(args[1], keepdim=keepdim), NAN), out[1]

    return run


def _prod(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    for d in dims:
        x = x.prod(d, keepdim=True)
    return x


def _mean(func: Any, args: Any, kwargs: Any) -> Any:
    given = _bound(func, args, kwargs)
    return _reduce(args[0], given.get("dim"), given.get("keepdim", False), 0.0, lambda x, n, d: x.sum(d, True) / n)


def _moments(x: torch.Tensor, dims: Any, keepdim: bool, correction: float) -> tuple[torch.Tensor, torch.Tensor]:
    mean = _reduce(x, dims, True, 0.0, lambda v, n, d: v.sum(d, True) / n)
    var = _reduce((x - mean) ** 2, dims, keepdim, 0.0, lambda v, n, d: v.sum(d, True) / (n - correction).clamp(min=0))
    return var, mean if keepdim else mean.reshape(var.shape)


def _var(func: Any, args: Any, kwargs: Any) -> Any:
    given = _bound(func, args, kwargs)
    correction = given.get("correction", 1)
    correction = 1 if correction is None else correction
    var, mean = _moments(args[0], given.get("dim"), given.get("keepdim", False), correction)
    name = str(func)
    value = var.sqrt() if "std" in name else var
    return (value, mean) if "_mean" in name else value


def _norm(func: Any, args: Any, kwargs: Any) -> Any:
    given = _bound(func, args, kwargs)
    p = given.get("ord", given.get("p", 2))
    p = 2 if p is None else p
    return _reduce(
        args[0],
        given.get("dim"),
        given.get("keepdim", False),
        0.0,
        lambda x, n, d: torch.linalg.vector_norm(x, p, d, keepdim=True),
    )


def _softmax(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], args[1]
    gone = x.isnan()
    function = torch.log_softmax if "log" in str(func) else torch.softmax
    return function(x.masked_fill(gone, float("-inf")), dim).masked_fill(gone, NAN)


def _cumulative(empty: float) -> Callable[[Any, Any, Any], Any]:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        gone = args[0].isnan()
        return func(args[0].masked_fill(gone, empty), *args[1:], **kwargs).masked_fill(gone, NAN)

    return run


def _loss(func: Any, args: Any, kwargs: Any) -> Any:
    """Of every value, then summed or averaged over what is present."""
    given = _bound(func, args, kwargs)
    gone = args[0].isnan() | args[1].isnan()
    more = {name: value for name, value in given.items() if name not in _LOSS_OWN}
    each = func(*(t.masked_fill(gone, 0.0) for t in args[:2]), reduction=0, **more)
    each = each.masked_fill(gone, NAN)
    reduction = given.get("reduction", 1)
    if reduction == 0:
        return each
    return _reduce(each, None, False, 0.0, lambda x, n, d: x.sum(d, True) / (n if reduction == 1 else 1))


def _unpool(func: Any, args: Any, kwargs: Any) -> Any:
    """A channel is absent as a whole."""
    gone = args[0].isnan().flatten(2).any(2)
    out = func(args[0].nan_to_num(0.0), *args[1:], **kwargs)
    return out.masked_fill(gone.reshape(*gone.shape, *[1] * (out.dim() - 2)), NAN)


def _bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return {**{a.name: v for a, v in zip(func._schema.arguments, args, strict=False)}, **kwargs}


# -- norms -------------------------------------------------------------------------------------------------------------


def _standardised(x: torch.Tensor, dims: list[int], eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    var, mean = _moments(x, dims, True, 0)
    rstd = (var + eps).rsqrt()
    return (x - mean) * rstd, mean, rstd


def _layer_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, shape, weight, bias, eps = args[:5]
    out, mean, rstd = _standardised(x, list(range(x.dim() - len(shape), x.dim())), eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias), mean, rstd


def _group_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias, batch, channels, _, groups, eps = args[:8]
    cut = x.reshape(batch, groups, channels // groups, -1)
    out, mean, rstd = _standardised(cut, [2, 3], eps)
    out = out.reshape(x.shape)
    sides = [1, channels] + [1] * (x.dim() - 2)
    out = out if weight is None else out * weight.reshape(sides)
    out = out if bias is None else out + bias.reshape(sides)
    return out, mean.reshape(batch, groups), rstd.reshape(batch, groups)


def _rms_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, shape = args[0], args[1]
    weight = args[2] if len(args) > 2 else None
    eps = args[3] if len(args) > 3 and args[3] is not None else torch.finfo(x.dtype).eps
    dims = list(range(x.dim() - len(shape), x.dim()))
    rstd = (_reduce(x * x, dims, True, 0.0, lambda v, n, d: v.sum(d, True) / n) + eps).rsqrt()
    out = x * rstd if weight is None else x * rstd * weight
    return (out, rstd) if "fused" in str(func) else out


def _weight_norm(func: Any, args: Any, kwargs: Any) -> Any:
    v, g = args[0], args[1]
    dim = (args[2] if len(args) > 2 else 0) % v.dim()
    others = [k for k in range(v.dim()) if k != dim]
    norm = _reduce(v, others, True, 0.0, lambda x, n, d: (x * x).sum(d, True).sqrt())
    return v * (g / norm), norm


# -- contractions ------------------------------------------------------------------------------------------------------


def _contracted(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """``function`` of what is present; absent where no product of present values contributes."""
    out = function(*(t.masked_fill(t.isnan(), 0.0) for t in tensors))
    mass = function(*((~t.isnan()).to(t.dtype.to_real()) for t in tensors))
    return out.masked_fill(mass < 0.5, NAN)


def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    return _contracted(func, *args[:2])


def _biased_matmul(func: Any, args: Any, kwargs: Any) -> Any:
    product = _contracted(torch.matmul, args[1], args[2])
    return kwargs.get("beta", 1) * args[0] + kwargs.get("alpha", 1) * product


def _convolution(func: Any, args: Any, kwargs: Any) -> Any:
    """A channel is absent or present as a whole: at the border of a padded map nothing may contribute, and it is 0."""
    x, weight, bias, *rest = args[:9]

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.convolution.default(x, weight, None, *rest)

    out = run(x.nan_to_num(0.0), weight.nan_to_num(0.0))
    mass = run((~x.isnan()).to(x.dtype), (~weight.isnan()).to(x.dtype))
    mass = mass.amax([0, *range(2, mass.dim())], keepdim=True)
    out = out.masked_fill(mass < 0.5, NAN)
    return out if bias is None else out + bias.reshape([1, -1] + [1] * (out.dim() - 2))


def _deform_conv(func: Any, args: Any, kwargs: Any) -> Any:
    """As :func:`_convolution`; whether anything contributes is told by a convolution without offsets."""
    x, weight, offset, mask, bias, *rest = args
    out = func(x.nan_to_num(0.0), weight.nan_to_num(0.0), offset, mask, torch.zeros_like(bias), *rest)
    present = (~x.isnan()).to(x.dtype), (~weight.isnan()).to(x.dtype)
    mass = torch.ops.aten.convolution.default(*present, None, rest[:2], rest[2:4], rest[4:6], False, [0, 0], rest[6])
    out = out.masked_fill(mass.amax([0, 2, 3], keepdim=True) < 0.5, NAN)
    return out + bias.reshape(1, -1, 1, 1)


def _renorm(func: Any, args: Any, kwargs: Any) -> Any:
    weight, gone = args[0], args[0].isnan()
    func(weight.masked_fill_(gone, 0.0), *args[1:], **kwargs)
    return weight.masked_fill_(gone, NAN)


def _cdist(func: Any, args: Any, kwargs: Any) -> Any:
    a, b, p = args[0], args[1], args[2] if len(args) > 2 else 2
    apart = a.unsqueeze(-2) - b.unsqueeze(-3)
    return _reduce(apart, [-1], False, 0.0, lambda x, n, d: torch.linalg.vector_norm(x, p, d, keepdim=True))


def _trilinear(func: Any, args: Any, kwargs: Any) -> Any:
    return _contracted(lambda *tensors: func(*tensors, *args[3:]), *args[:3])


def _attention(func: Any, args: Any, kwargs: Any) -> Any:
    given = _bound(func, args, kwargs)
    q, k, v = args[:3]
    scale = given.get("scale")
    if k.shape[-3] != q.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = _contracted(torch.matmul, q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if given.get("is_causal"):
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    mask = given.get("attn_mask", given.get("attn_bias"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    gone = scores.isnan()
    weights = scores.masked_fill(gone, float("-inf")).softmax(-1).masked_fill(gone, NAN)
    out = _contracted(torch.matmul, weights, v)
    returns = len(func._schema.returns)
    return out if returns == 1 else (out, *[torch.zeros(0)] * (returns - 1))


SEMANTICS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "sum": _plain(0.0, torch.sum),
    "amax": _plain(float("-inf"), torch.amax),
    "max": _extremum(float("-inf")),
    "amin": _plain(float("inf"), torch.amin),
    "min": _extremum(float("inf")),
    "prod": _plain(1.0, _prod),
    "logsumexp": _plain(float("-inf"), torch.logsumexp),
    "mean": _mean,
    "var": _var,
    "std": _var,
    "var_mean": _var,
    "std_mean": _var,
    "linalg_vector_norm": _norm,
    "norm": _norm,
    "_softmax": _softmax,
    "_safe_softmax": _softmax,
    "_log_softmax": _softmax,
    "nansum": _plain(0.0, torch.sum),
    "cumsum": _cumulative(0.0),
    "cumprod": _cumulative(1.0),
    "logcumsumexp": _cumulative(float("-inf")),
    "mse_loss": _loss,
    "huber_loss": _loss,
    "smooth_l1_loss": _loss,
    "binary_cross_entropy_with_logits": _loss,
    "max_unpool2d": _unpool,
    "max_unpool3d": _unpool,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "_fused_rms_norm": _rms_norm,
    "_weight_norm_interface": _weight_norm,
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "vdot": _matmul,
    "addmm": _biased_matmul,
    "baddbmm": _biased_matmul,
    "convolution": _convolution,
    "_convolution": _convolution,
    "deform_conv2d": _deform_conv,
    "embedding_renorm_": _renorm,
    "_cdist_forward": _cdist,
    "_euclidean_dist": _cdist,
    "_trilinear": _trilinear,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_attention_math": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "scaled_dot_product_attention": _attention,
}
