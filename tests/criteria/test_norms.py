from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stp_fx.criteria.norms as module
from stp_fx.criteria import power_sums
from stp_fx.errors import CriterionError


def reference(weight: torch.Tensor, p: float, dim: int) -> np.ndarray:
    array = weight.detach().double().numpy()
    return np.array([sum(abs(float(v)) ** p for v in array.take(k, axis=dim).ravel()) for k in range(array.shape[dim])])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    p=st.sampled_from([1.0, 2.0, 0.5, 3.0]),
    block=st.sampled_from([1, 5, 16, 1 << 18]),
    flush=st.sampled_from([1, 2, 64]),
    order=st.randoms(use_true_random=False),
    data=st.data(),
)
def test_agrees_with_loops_for_every_layout_and_block(shape, seed, p, block, flush, order, data):
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    stored = torch.randn([2 * n for n in shape], generator=torch.Generator().manual_seed(seed))
    weight = stored[tuple(slice(0, 2 * n, 2) for n in shape)].permute(permutation)
    dims = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_BLOCK", block)
        patch.setattr(module, "_BLOCKS_PER_FLUSH", flush)
        sums = power_sums(weight, p, dims)
    assert sorted(sums) == sorted(dims)
    for dim in dims:
        assert sums[dim].dtype == np.float64
        np.testing.assert_allclose(sums[dim], reference(weight, p, dim), rtol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_layouts(dtype, layout):
    torch.manual_seed(0)
    weight = torch.randn(96, 80, 3, 5).to(dtype).to(memory_format=layout)
    exact = weight.double().square()
    sums = power_sums(weight, 2.0, (0, 1, 3))
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for dim in (0, 1, 3):
        others = [k for k in range(4) if k != dim]
        np.testing.assert_allclose(sums[dim], exact.sum(others).numpy(), rtol=tolerance)


def test_large_float32_sums_keep_their_digits():
    weight = torch.full((4096, 1024), 0.1)
    sums = power_sums(weight, 2.0, (0, 1))
    exact = float(torch.tensor(0.1).double() ** 2)
    np.testing.assert_allclose(sums[0], exact * 1024, rtol=1e-6)
    np.testing.assert_allclose(sums[1], exact * 4096, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_squares_outside_float32_are_rescued(scale, p):
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * scale
    for dim in (0, 1):
        np.testing.assert_allclose(power_sums(weight, p, (dim,))[dim], reference(weight, p, dim), rtol=1e-6)


def test_half_precision_accumulates_in_float32():
    weight = torch.full((2, 40000), 4.0, dtype=torch.float16)  # the sum of squares, 640000, overflows half
    np.testing.assert_allclose(power_sums(weight, 2.0, (0,))[0], [640000.0, 640000.0], rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_show(bad):
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    sums = power_sums(weight, 2.0, (0, 1))
    assert np.isfinite(sums[0]).tolist() == [True, False, True]
    assert np.isfinite(sums[1]).tolist() == [True, True, False, True]


def test_zero_and_empty_weights():
    assert power_sums(torch.zeros(3, 2), 2.0, (0, 1))[1].tolist() == [0.0, 0.0]
    assert power_sums(torch.zeros(3, 0), 2.0, (0,))[0].tolist() == [0.0, 0.0, 0.0]


def test_parameters_and_expanded_tensors():
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    np.testing.assert_allclose(power_sums(parameter, 1.0, (1,))[1], [3.0, 5.0, 7.0])
    expanded = torch.arange(3.0).expand(4, 3)
    np.testing.assert_allclose(power_sums(expanded, 2.0, (0, 1))[1], [0.0, 4.0, 16.0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(CriterionError, match=str(dtype)):
        power_sums(torch.ones(2, 2).to(dtype), 2.0, (0,))
