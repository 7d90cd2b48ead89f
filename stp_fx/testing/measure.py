"""Running, comparing and counting, as the laws need it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["assert_same", "buffers_restored", "count_macs", "count_params", "loss_of", "run", "shapes_of", "state_of"]

TOLERANCE = 1e-9
"""Relative to the largest number of an output, in double precision."""

Inputs = Sequence[Any]


def assert_same(actual: Any, expected: Any, what: str, *, tolerance: float = TOLERANCE) -> None:
    """Two outputs (tensors, or tuples and dicts of them) agree relative to the largest number of each tensor."""
    assert type(actual) is type(expected) or {type(actual), type(expected)} <= {tuple, list}, f"{what}: {type(actual)}"
    if isinstance(expected, Mapping):
        assert list(actual) == list(expected), what
        for key, each in expected.items():
            assert_same(actual[key], each, f"{what}, {key!r}", tolerance=tolerance)
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), what
        for position, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, b, f"{what}, [{position}]", tolerance=tolerance)
    elif isinstance(expected, torch.Tensor):
        actual, expected = actual.detach(), expected.detach()
        assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
        if not expected.is_floating_point():
            assert torch.equal(actual, expected), what
            return
        assert bool(expected.isfinite().all()), f"{what}: the expected numbers are not finite"
        if expected.numel():
            scale = max(float(expected.abs().max()), 1e-30)
            error = float((actual - expected).abs().max()) / scale
            assert error <= tolerance, f"{what}: relative error {error:.3g}, allowed {tolerance:.3g}"


def count_macs(module: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates by torch's own counter, with kernels of attention spelled out."""
    counter = FlopCounterMode(display=False, custom_mapping=_COUNTED)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            module(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


def _count_mv(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a_shape)


def _count_trilinear(a: Any, b: Any, c: Any, expand1: Any, expand2: Any, expand3: Any, *args: Any, **kwargs: Any) -> int:
    shapes = []
    for shape, expand in ((a, expand1), (b, expand2), (c, expand3)):
        sizes = list(shape)
        for position in sorted(expand):
            sizes.insert(position, 1)
        shapes.append(sizes)
    return 2 * math.prod(max(column) for column in zip(*shapes, strict=True))


# what torch's counter leaves out
_COUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: _count_mv,
    torch.ops.aten.dot: _count_mv,
    torch.ops.aten.vdot: _count_mv,
    torch.ops.aten._trilinear: _count_trilinear,
}


def count_params(module: nn.Module) -> int:
    """Parameter elements, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    gradients = {f"{n}.grad": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return {**state, **gradients}


def run(module: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad():
        return module(*(value.clone() if isinstance(value, torch.Tensor) else value for value in inputs))


def shapes_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return {key: shapes_of(item) for key, item in value.items()}
    return [shapes_of(item) for item in value]


def loss_of(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output.square().mean()
    items = list(output.values()) if isinstance(output, Mapping) else output
    return torch.stack([loss_of(item) for item in items]).sum()


class buffers_restored:
    """Running statistics move in train mode; the original's are put back."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers: dict[torch.Tensor, torch.Tensor] = {buffer: buffer.clone() for buffer in module.buffers()}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        with torch.no_grad():
            for buffer, value in self.buffers.items():
                buffer.copy_(value)
