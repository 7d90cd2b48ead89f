"""New tensors: sizes written in the graph are axes of their own; ranges count positions and are fixed."""

from __future__ import annotations

from typing import Any

import torch

from stp_fx.rules.call import OpCall
from stp_fx.rules.domain import fixed_dim, fixed_dims
from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import edits, keeps
from stp_fx.rules.ops.view import renew_sizes
from stp_fx.rules.registry import overloads, rule
from stp_fx.rules.samples import Make, arguments

__all__: list[str] = []

aten = torch.ops.aten


def _size(edit: Edit) -> None:
    renew_sizes(edit, "size", edit.result_dims(), infer=False)


def _create(call: OpCall) -> None:
    """An axis of its own for every size of two or more; a size of zero stays zero."""
    sizes = [int(size) for size in call.out.shape]
    axes = [call.literal_axis(size, f"{call.name} of size {size}") if size > 1 else fixed_dim(size) for size in sizes]
    call.assign(call.out, tuple(axes))


rule(
    *(aten.zeros.default, aten.ones.default, aten.rand.default, aten.randn.default),
    calls=[edits(_size, torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn, takes="*size", sizes="size")],
    samples=lambda t: arguments([2, 3], device=t.device),
)(_create)
rule(
    aten.empty.memory_format,
    samples=lambda t: arguments([2, 3], device=t.device),
    unchecked="its values are arbitrary",
)(_create)
rule(
    aten.full.default,
    calls=[edits(_size, torch.full, takes="size fill_value", sizes="size")],
    samples=lambda t: arguments([2, 3], 1.0, device=t.device),
)(_create)
rule(
    aten.empty_strided.default,
    samples=lambda t: arguments([2, 3], [3, 1], device=t.device),
    unchecked="its values are arbitrary",
)(_create)
rule(
    aten.new_zeros.default,
    aten.new_ones.default,
    calls=[edits(_size, "new_zeros", "new_ones", "new_empty", takes="input *size", sizes="size")],
    samples=lambda t: arguments(t(5), [2, 3]),
)(_create)
rule(aten.new_empty.default, samples=lambda t: arguments(t(5), [2, 3]), unchecked="its values are arbitrary")(_create)
rule(
    aten.new_full.default,
    calls=[edits(_size, "new_full", takes="input size fill_value", sizes="size")],
    samples=lambda t: arguments(t(5), [2, 3], 1.0),
)(_create)
rule(
    aten.new_empty_strided.default,
    samples=lambda t: arguments(t(5), [2, 3], [3, 1]),
    unchecked="its values are arbitrary",
)(_create)


def _range(call: OpCall) -> None:
    call.assign(call.out, fixed_dims(call.out.shape))


def _on(*values: Any) -> Any:
    """The sample of a call that makes a tensor from numbers alone."""

    def sample(t: Make) -> Any:
        return arguments(*values, device=t.device)

    return sample


rule(aten.arange.default, aten.eye.default, samples=_on(4))(_range)
rule(aten.arange.start, samples=_on(1, 4))(_range)
rule(aten.arange.start_step, samples=_on(0, 8, 2))(_range)
rule(aten.linspace.default, samples=_on(0.0, 1.0, 5))(_range)
rule(aten.eye.m, samples=_on(4, 3))(_range)
rule(aten.scalar_tensor.default, samples=_on(1.0))(_range)
rule(aten.randint.default, samples=_on(9, [2, 3]))(_range)
rule(aten.randint.low, samples=_on(1, 9, [2, 3]))(_range)
rule(aten.randperm.default, samples=_on(5))(_range)
rule(aten.tril_indices.default, aten.triu_indices.default, samples=_on(3, 4))(_range)


def _assertion(call: OpCall) -> None:
    """Assertions touch nothing and must not pin."""
    for tensor in call.outs:
        call.assign(tensor, call.dims(tensor))


rule(aten._assert_async.default, samples=lambda t: arguments(t(1)))(_assertion)
rule(aten._assert_async.msg, calls=[keeps(torch._assert_async)], samples=lambda t: arguments(t(1), "no"))(_assertion)
rule(aten._functional_assert_async.msg, samples=lambda t: arguments(t(1), "no", t(1)))(_assertion)
rule(*overloads("aten._assert_tensor_metadata.default"), samples=lambda t: arguments(t(2, 3)))(_assertion)
rule(
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    samples=lambda t: arguments(3),
)(_assertion)
