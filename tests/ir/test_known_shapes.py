"""The memo of shapes gives what torch gives: shapes, dtypes, strides, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

from stp_fx.ir.known_shapes import known_result
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.nested import tensors_within

_aten = torch.ops.aten


class _Compared(TorchDispatchMode):
    """Asks the memo twice at each call, so that the second answer comes from it, and compares with torch."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        answers = [known_result(func, args, kwargs) for _ in range(2)]
        result = func(*args, **kwargs)
        for answer in answers:
            if answer is not NotImplemented:
                self.known.add(str(func))
                assert _described(answer) == _described(result), func
                assert not {id(t) for t in tensors_within(answer)} & {id(t) for t in tensors_within([args, kwargs])}
        return result


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        long = [(size, stride) for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]
        return value.dtype, value.shape, long if value.numel() else [], value.device
    if isinstance(value, (list, tuple)):
        return [_described(each) for each in value]
    return value


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t", "googlenet", "efficientnet_b0"])
@pytest.mark.parametrize("training", [False, True])
def test_networks(name: str, training: bool) -> None:
    with torch.device("meta"):
        model = getattr(models, name)(**({"init_weights": False} if name == "googlenet" else {}))
    with torch.no_grad(), _Compared() as compared:
        model.train(training)(torch.empty(3, 3, 96, 96, device="meta"))
    assert len(compared.known) > 5


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CALLS = {
    "broadcast": lambda: _x(4, 1, 5) + _x(3, 5),
    "broadcast one way": lambda: _x(4, 3, 5) * _x(3, 1),
    "dtypes": lambda: _x(4, dtype=torch.float64) + _x(4, dtype=torch.float16),
    "whole and real": lambda: _x(4, dtype=torch.int32) + 1.5,
    "whole numbers": lambda: _x(4, dtype=torch.int32) + 1,
    "flag": lambda: _x(4, dtype=torch.bool) + True,
    "division of whole numbers": lambda: _x(4, dtype=torch.int64) / _x(4, dtype=torch.int64),
    "no dimension": lambda: _x(4, dtype=torch.float16) * _x(dtype=torch.float32),
    "only numbers without dimension": lambda: _x(dtype=torch.float16) * _x(dtype=torch.float32),
    "comparison": lambda: _x(2, 3) > _x(3),
    "transposed": lambda: _x(4, 3).t() + _x(3, 4),
    "into channels last": lambda: _x(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "clone in channels last": lambda: _x(2, 3, 4, 4).clone(memory_format=torch.channels_last),
    "like, in channels last": lambda: torch.zeros_like(_x(2, 3, 4, 4), memory_format=torch.channels_last),
    "volumes": lambda: _x(2, 3, 4, 4, 4).to(memory_format=torch.channels_last_3d) * 2,
    "expanded": lambda: _x(4, 1).expand(4, 3) + 1,
    "channels last": lambda: _x(2, 8, 4, 4).to(memory_format=torch.channels_last) + _x(8, 1, 1),
    "empty": lambda: _x(0, 3) + _x(1, 3),
    "where": lambda: torch.where(_x(3, dtype=torch.bool), _x(3), _x(3, dtype=torch.float64)),
    "masked": lambda: _x(2, 3).masked_fill(_x(3, dtype=torch.bool), 0.0),
    "magnitude": lambda: _x(3, dtype=torch.complex64).abs(),
    "signbit": lambda: torch.signbit(_x(3)),
    "several results": lambda: torch.max(_x(3, 4), dim=1),
    "statistics": lambda: torch.var_mean(_x(3, 4), dim=1),
    "sum to another dtype": lambda: _x(3, dtype=torch.float16).sum(dtype=torch.float64),
    "pooled": lambda: F.max_pool2d(_x(1, 2, 8, 8), 2, return_indices=True),
    "bilinear": lambda: F.interpolate(_x(1, 2, 8, 8), scale_factor=2, mode="bilinear"),
    "a factory": lambda: torch.zeros_like(_x(3), dtype=torch.int8),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    with torch.no_grad(), _Compared():
        CALLS[name]()


def test_the_default_dtype_counts() -> None:
    x = _x(3, dtype=torch.int64)
    with MetaRun():
        assert (x / 2).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert (x / 2).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_equal_numbers_of_two_kinds_are_two_keys() -> None:
    x = _x(3, dtype=torch.int64)
    with MetaRun():
        assert (x + 1).dtype == torch.int64
        assert (x + 1.0).dtype == torch.float32
        assert (_x(3, dtype=torch.bool) + True).dtype == torch.bool
        assert (_x(3, dtype=torch.bool) + 1).dtype == torch.int64


@pytest.mark.parametrize(
    "call", [lambda: _x(3) + _x(4), lambda: _x(2, 3) @ _x(2, 3), lambda: F.conv2d(_x(1, 2, 4, 4), _x(2, 3, 1, 1))]
)
def test_errors_are_those_of_torch(call: Any) -> None:
    with pytest.raises(RuntimeError) as plain:
        call()
    for _ in range(2):
        with MetaRun(), pytest.raises(RuntimeError) as known:
            call()
        assert str(known.value) == str(plain.value)


@pytest.mark.parametrize(("func", "args"), [
    (_aten.view.default, (_x(4), [2, 2])),
    (_aten.relu_.default, (_x(4),)),
    (_aten.add.Tensor, (torch.ones(4), torch.ones(4))),
    (_aten.arange.default, (4,)),
    (_aten.nonzero.default, (_x(4),)),
])  # fmt: skip
def test_what_is_left_to_torch(func: Any, args: Any) -> None:
    """Views, ops that write, tensors with numbers in them, and sizes that follow from data."""
    assert known_result(func, args, {}) is NotImplemented


def test_modes_below_see_every_call() -> None:
    seen: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        with Log(), MetaRun():
            _x(3) + 1
    assert seen.count("aten.add.Tensor") == 2
