"""At least one call per registered op (more behind a ``#``): what ``t`` makes gets an axis of its own for each dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Make = Callable[..., torch.Tensor]
Sample = Callable[[Make], tuple[tuple[Any, ...], dict[str, Any]]]


def args(*values: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return values, named


def index(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


SAMPLES: dict[str, Sample] = {}


def sample(*names: str) -> Callable[[Sample], Sample]:
    def register(function: Sample) -> Sample:
        for name in names:
            assert name not in SAMPLES, name
            SAMPLES[name] = function
        return function

    return register


A = "aten."
# contraction
sample(A + "mm.default")(lambda t: args(t(2, 3), t(3, 5)))
sample(A + "addmm.default")(lambda t: args(t(5), t(2, 3), t(3, 5)))
sample(A + "bmm.default")(lambda t: args(t(2, 3, 5), t(2, 5, 7)))
sample(A + "baddbmm.default")(lambda t: args(t(2, 3, 7), t(2, 3, 5), t(2, 5, 7)))
sample(A + "mv.default")(lambda t: args(t(2, 3), t(3)))
sample(A + "dot.default", A + "vdot.default")(lambda t: args(t(3), t(3)))
sample(A + "_cdist_forward.default")(lambda t: args(t(2, 3, 5), t(2, 7, 5), 2.0, None))
sample(A + "_euclidean_dist.default")(lambda t: args(t(3, 5), t(7, 5)))
sample(A + "convolution.default")(lambda t: args(t(2, 6, 5, 7), t(4, 3, 3, 3), t(4), [1, 1], [0, 0], [1, 1], False, [0, 0], 2))
sample(A + "convolution.default#transposed")(
    lambda t: args(t(2, 6, 5, 7), t(6, 2, 3, 3), t(4), [1, 1], [0, 0], [1, 1], True, [0, 0], 2)
)
sample(A + "_convolution.default")(
    lambda t: args(t(2, 6, 5, 7), t(12, 1, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 6, False, False, True, True)
)
sample(A + "_trilinear.default")(lambda t: args(t(2, 3), t(5, 3, 7), t(2, 7), [1, 3], [0], [1, 2], [2, 3]))

# norms, softmax, reductions
_BN = lambda t: (t(2, 6, 5, 7), t(6), t(6), t(6), t(6))  # noqa: E731
sample(A + "native_batch_norm.default", A + "_native_batch_norm_legit.default")(lambda t: args(*_BN(t), False, 0.1, 1e-5))
sample(A + "cudnn_batch_norm.default", A + "miopen_batch_norm.default")(lambda t: args(*_BN(t), True, 0.1, 1e-5))
sample(
    A + "_native_batch_norm_legit_no_training.default", A + "_batch_norm_with_update.default", A + "_batch_norm_no_update.default"
)(lambda t: args(*_BN(t), 0.1, 1e-5))
sample(A + "_native_batch_norm_legit.no_stats")(lambda t: args(t(2, 6, 5), t(6), t(6), True, 0.1, 1e-5))
sample(A + "native_layer_norm.default")(lambda t: args(t(2, 3, 6), [6], t(6), t(6), 1e-5))
sample(A + "_fused_rms_norm.default", A + "rms_norm.default")(lambda t: args(t(2, 3, 6), [6], t(6), 1e-5))
sample(A + "native_group_norm.default")(lambda t: args(t(2, 6, 5), t(6), t(6), 2, 6, 5, 3, 1e-5))
sample(A + "_weight_norm_interface.default")(lambda t: args(t(6, 5), t(6, 1), 0))
sample(A + "_softmax.default", A + "_log_softmax.default")(lambda t: args(t(2, 6, 5), 1, False))
sample(A + "_safe_softmax.default", A + "cumprod.default", A + "logcumsumexp.default", A + "cumsum.default")(
    lambda t: args(t(2, 6, 5), 1)
)
for _name in ("sum", "nansum", "mean", "max", "min", "prod", "any", "all", "median"):
    sample(A + _name + ".default")(lambda t: args(t(2, 6)))
sample(A + "amax.default", A + "amin.default", A + "sum.dim_IntList", A + "mean.dim", A + "logsumexp.default")(
    lambda t: args(t(2, 6, 5), [1], True)
)
sample(A + "any.dims")(lambda t: args(t(2, 6, 5), [1]))
sample(A + "count_nonzero.dim_IntList")(lambda t: args(t(2, 6, 5), [1]))
sample(A + "linalg_vector_norm.default")(lambda t: args(t(2, 6, 5), 2.0, [1]))
sample(A + "norm.Scalar")(lambda t: args(t(2, 6)))
sample(A + "norm.ScalarOpt_dim")(lambda t: args(t(2, 6, 5), 2.0, [1]))
sample(A + "max.dim", A + "min.dim", A + "median.dim", A + "any.dim", A + "all.dim", A + "prod.dim_int")(
    lambda t: args(t(2, 6, 5), 1)
)
sample(A + "var.correction", A + "std.correction", A + "var_mean.correction", A + "std_mean.correction")(
    lambda t: args(t(2, 6, 5), [1])
)
sample(A + "argmax.default", A + "argmin.default", A + "sort.default", A + "argsort.default", A + "mode.default")(
    lambda t: args(t(2, 6, 5), 1)
)
sample(A + "cummax.default", A + "cummin.default")(lambda t: args(t(2, 6, 5), 1))
sample(A + "sort.stable")(lambda t: args(t(2, 6, 5), stable=True, dim=1))
sample(A + "topk.default", A + "kthvalue.default")(lambda t: args(t(2, 6, 5), 3, 1))

sample(A + "convolution.default#depthwise")(
    lambda t: args(t(2, 6, 5, 7), t(12, 1, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 6)
)

# pooling, resizing, patches
sample(A + "max_pool1d_with_indices.default", A + "avg_pool1d.default")(lambda t: args(t(2, 6, 8), [2], [2]))
sample(A + "adaptive_avg_pool1d.default")(lambda t: args(t(2, 6, 8), [2]))
sample(A + "max_pool2d_with_indices.default", A + "avg_pool2d.default")(lambda t: args(t(2, 6, 8, 10), [2, 2], [2, 2]))
sample(A + "_adaptive_avg_pool2d.default", A + "adaptive_max_pool2d.default")(lambda t: args(t(2, 6, 8, 10), [2, 2]))
sample(A + "fractional_max_pool2d.default")(lambda t: args(t(2, 6, 8, 10), [2, 2], [3, 4], t(2, 6, 2)))
sample(A + "max_unpool2d.default")(lambda t: args(t(2, 6, 4, 5), index(2, 6, 4, 5), [8, 10]))
sample(A + "max_pool3d_with_indices.default", A + "avg_pool3d.default")(lambda t: args(t(2, 6, 4, 8, 10), [2, 2, 2], [2, 2, 2]))
sample(A + "_adaptive_avg_pool3d.default", A + "adaptive_max_pool3d.default")(lambda t: args(t(2, 6, 4, 8, 10), [2, 2, 2]))
for _rank, _size in ((1, [9]), (2, [9, 11]), (3, [5, 9, 11])):
    _shape = {1: (2, 6, 8), 2: (2, 6, 8, 10), 3: (2, 6, 4, 8, 10)}[_rank]
    for _name in ("reflection_pad", "replication_pad"):
        sample(f"{A}{_name}{_rank}d.default")(lambda t, s=_shape, r=_rank: args(t(*s), [1, 1] * r))
    for _name in ("upsample_nearest", "_upsample_nearest_exact"):
        sample(f"{A}{_name}{_rank}d.default")(lambda t, s=_shape, o=_size: args(t(*s), o))
    _name = {1: "upsample_linear1d", 2: "upsample_bilinear2d", 3: "upsample_trilinear3d"}[_rank]
    sample(f"{A}{_name}.default")(lambda t, s=_shape, o=_size: args(t(*s), o, False))
sample(A + "_upsample_bilinear2d_aa.default", A + "upsample_bicubic2d.default", A + "_upsample_bicubic2d_aa.default")(
    lambda t: args(t(2, 6, 8, 10), [9, 11], False)
)
sample(A + "grid_sampler_2d.default")(lambda t: args(t(2, 6, 8, 10), t(2, 5, 7, 2), 0, 0, False))
sample(A + "grid_sampler_3d.default")(lambda t: args(t(2, 6, 4, 8, 10), t(2, 3, 5, 7, 3), 0, 0, False))
sample(A + "im2col.default")(lambda t: args(t(2, 6, 8, 10), [3, 3], [1, 1], [0, 0], [1, 1]))
sample(A + "col2im.default")(lambda t: args(t(2, 54, 48), [8, 10], [3, 3], [1, 1], [0, 0], [1, 1]))
sample(A + "pixel_shuffle.default")(lambda t: args(t(2, 12, 3, 5), 2))
sample(A + "pixel_unshuffle.default")(lambda t: args(t(2, 3, 4, 6), 2))
sample(A + "channel_shuffle.default", A + "native_channel_shuffle.default")(lambda t: args(t(2, 6, 3, 5), 2))

# views
sample(A + "view.default", A + "_unsafe_view.default", A + "reshape.default")(lambda t: args(t(2, 12, 5), [2, 3, 4, 5]))
sample(A + "_reshape_alias.default")(lambda t: args(t(2, 12, 5), [2, 60], [60, 1]))
sample(A + "permute.default")(lambda t: args(t(2, 3, 5), [0, 2, 1]))
sample(A + "transpose.int", A + "transpose_.default")(lambda t: args(t(2, 3, 5), 1, 2))
sample(A + "t.default")(lambda t: args(t(2, 3)))
sample(A + "unsqueeze.default", A + "unsqueeze_.default")(lambda t: args(t(2, 3), 1))
sample(A + "squeeze.default", A + "squeeze_.default")(lambda t: args(t(2, 1, 3)))
sample(A + "squeeze.dim", A + "squeeze_.dim")(lambda t: args(t(2, 1, 3), 1))
sample(A + "squeeze.dims")(lambda t: args(t(2, 1, 3, 1), [1, 3]))
sample(A + "expand.default")(lambda t: args(t(2, 1, 3), [2, 4, 3]))
sample(A + "repeat.default")(lambda t: args(t(2, 3), [4, 1, 2]))
sample(A + "diagonal.default")(lambda t: args(t(3, 3)))
sample(A + "as_strided.default")(lambda t: args(t(2, 6), [3, 4], [4, 1]))
sample(A + "as_strided_.default")(lambda t: args(t(2, 6, 1, 1), [2, 6, 1, 1], [6, 1, 6, 6]))
sample(A + "as_strided_.default#other")(lambda t: args(t(2, 6), [3, 4], [4, 1]))
sample(A + "unfold.default")(lambda t: args(t(2, 6), 1, 3, 1))
sample(A + "tril.default", A + "triu.default")(lambda t: args(t(2, 3, 5)))

# joins and pieces
sample(A + "slice.Tensor")(lambda t: args(t(2, 8), 1, 2, 6))
for _name in ("split.Tensor", "unsafe_split.Tensor"):
    sample(A + _name)(lambda t: args(t(2, 8), 4, 1))
for _name in ("split_with_sizes.default", "unsafe_split_with_sizes.default"):
    sample(A + _name)(lambda t: args(t(2, 8), [3, 5], 1))
sample(A + "glu.default")(lambda t: args(t(2, 8), 1))
sample(A + "select.int")(lambda t: args(t(2, 8), 1, 3))
sample(A + "unbind.int")(lambda t: args(t(2, 3), 1))
sample(A + "cat.default")(lambda t: args([t(2, 3), t(2, 5)], 1))
sample(A + "stack.default")(lambda t: args([t(2, 3), t(2, 3)], 1))
sample(A + "flip.default")(lambda t: args(t(2, 3), [1]))
sample(A + "roll.default")(lambda t: args(t(2, 5), [2], [1]))
sample(A + "constant_pad_nd.default")(lambda t: args(t(2, 5), [2, 1], 0.0))

# indexing
sample(A + "index_select.default")(lambda t: args(t(2, 5), 1, index(3)))
sample(A + "index.Tensor", A + "_unsafe_index.Tensor")(lambda t: args(t(2, 5, 3), [None, index(4)]))
sample(A + "embedding.default")(lambda t: args(t(9, 5), index(2, 3)))
sample(A + "_embedding_bag.default", A + "_embedding_bag_forward_only.default")(lambda t: args(t(9, 5), index(6), index(2)))
sample(A + "gather.default")(lambda t: args(t(2, 5), 1, index(2, 3)))
sample(A + "scatter.src", A + "scatter_.src")(lambda t: args(t(2, 5), 1, index(2, 3), t(2, 3)))
sample(A + "scatter.value", A + "scatter_.value")(lambda t: args(t(2, 5), 1, index(2, 3), 0.0))
sample(A + "scatter_add.default", A + "scatter_add_.default")(lambda t: args(t(2, 5), 1, index(2, 3), t(2, 3)))
sample(A + "scatter_reduce.two", A + "scatter_reduce_.two")(lambda t: args(t(2, 5), 1, index(2, 3), t(2, 3), "sum"))
sample(A + "index_put.default", A + "index_put_.default", A + "_index_put_impl_.default")(
    lambda t: args(t(2, 5), [None, index(3)], t(2, 3))
)
sample(A + "slice_scatter.default")(lambda t: args(t(2, 5), t(2, 3), 1, 0, 3))
sample(A + "select_scatter.default")(lambda t: args(t(2, 5), t(2), 1, 0))

# attention
_QKV = lambda t: (t(2, 4, 3, 8), t(2, 4, 5, 8), t(2, 4, 5, 8))  # noqa: E731
sample(A + "scaled_dot_product_attention.default")(lambda t: args(t(2, 4, 3, 8), t(2, 2, 5, 8), t(2, 2, 5, 8), enable_gqa=True))
sample(
    A + "_scaled_dot_product_flash_attention.default",
    A + "_scaled_dot_product_flash_attention_for_cpu.default",
    A + "_scaled_dot_product_attention_math.default",
    A + "_scaled_dot_product_attention_math_for_mps.default",
)(lambda t: args(*_QKV(t)))
sample(
    A + "_scaled_dot_product_efficient_attention.default",
    A + "_scaled_dot_product_cudnn_attention.default",
)(lambda t: args(*_QKV(t), t(2, 4, 3, 5), False))
sample(A + "_scaled_dot_product_fused_attention_overrideable.default")(lambda t: args(*_QKV(t), t(2, 4, 3, 5)))

# pointwise kin and copies
for _name in (
    "clone",
    "detach",
    "alias",
    "_to_copy",
    "lift_fresh",
    "lift_fresh_copy",
    "lift",
    "contiguous",
    "bernoulli",
    "zero_",
    "detach_",
):
    sample(f"{A}{_name}.default")(lambda t: args(t(2, 3)))
for _name in ("zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "normal_", "uniform_"):
    sample(f"{A}{_name}.default")(lambda t: args(t(2, 3)))
sample(A + "bernoulli.p", A + "bernoulli_.float")(lambda t: args(t(2, 3), 0.5))
sample(A + "native_dropout.default")(lambda t: args(t(2, 3), 0.5, True))
sample(A + "fill_.Scalar", A + "fill.Scalar", A + "full_like.default")(lambda t: args(t(2, 3), 1.0))
sample(A + "copy_.default", A + "copy.default")(lambda t: args(t(2, 3), t(2, 3)))
sample(A + "_prelu_kernel.default")(lambda t: args(t(2, 3, 5), t(1, 3, 1)))
sample(A + "masked_fill.Scalar", A + "masked_fill_.Scalar")(lambda t: args(t(2, 3), t(1, 3, dtype=torch.bool), 0.0))
sample(A + "masked_fill.Tensor", A + "masked_fill_.Tensor")(
    lambda t: args(t(2, 3), t(1, 3, dtype=torch.bool), torch.empty((), device="meta"))
)
sample(A + "rrelu_with_noise.default")(lambda t: args(t(2, 3), t(2, 3), 0.1, 0.3))

# new tensors
for _name in ("zeros.default", "ones.default", "empty.memory_format", "rand.default", "randn.default"):
    sample(A + _name)(lambda t: args([2, 3], device="meta"))
sample(A + "full.default")(lambda t: args([2, 3], 1.0, device="meta"))
sample(A + "empty_strided.default")(lambda t: args([2, 3], [3, 1], device="meta"))
for _name in ("new_zeros", "new_ones", "new_empty"):
    sample(f"{A}{_name}.default")(lambda t: args(t(5), [2, 3]))
sample(A + "new_full.default")(lambda t: args(t(5), [2, 3], 1.0))
sample(A + "new_empty_strided.default")(lambda t: args(t(5), [2, 3], [3, 1]))
sample(A + "arange.default")(lambda t: args(4, device="meta"))
sample(A + "arange.start")(lambda t: args(1, 4, device="meta"))
sample(A + "randint.low")(lambda t: args(1, 9, [2, 3], device="meta"))
sample(A + "arange.start_step")(lambda t: args(0, 8, 2, device="meta"))
sample(A + "linspace.default")(lambda t: args(0.0, 1.0, 5, device="meta"))
sample(A + "eye.default")(lambda t: args(4, device="meta"))
sample(A + "eye.m")(lambda t: args(4, 3, device="meta"))
sample(A + "scalar_tensor.default")(lambda t: args(1.0, device="meta"))
sample(A + "randint.default")(lambda t: args(9, [2, 3], device="meta"))
sample(A + "randperm.default")(lambda t: args(5, device="meta"))
sample(A + "tril_indices.default", A + "triu_indices.default")(lambda t: args(3, 4, device="meta"))

# assertions
sample(A + "_assert_async.default")(lambda t: args(t(1)))
sample(A + "_assert_async.msg")(lambda t: args(t(1), "no"))
sample(A + "_functional_assert_async.msg")(lambda t: args(t(1), "no", t(1)))
sample(A + "_assert_tensor_metadata.default")(lambda t: args(t(2, 3)))
sample(A + "sym_constrain_range.default", A + "sym_constrain_range_for_size.default")(lambda t: args(3))
