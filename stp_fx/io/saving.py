"""``save``: a pruned, masked or untouched graph as one file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from stp_fx.errors import FileError, InputError
from stp_fx.io.contents import Contents, encode
from stp_fx.io.files import write_file
from stp_fx.io.tensors import Stored, order_of, stored_tensors
from stp_fx.ir import Provenance, has_provenance, provenance_of
from stp_fx.ir.provenance import floating_dtype
from stp_fx.paths import path_of
from stp_fx.selection import PrunePlan

__all__ = ["save"]


def save(pruned: fx.GraphModule, path: Any) -> None:
    """Writes ``pruned`` to one file: what has been removed and masked, and every tensor. No pickle, and nothing that runs.

    The file is a safetensors file: ``safetensors.torch.load_file(path)`` reads its tensors, named as in ``pruned.state_dict()``
    (tied ones once; complex ones as pairs of real numbers; masks are in the plan). Dtypes, ties, memory order,
    ``requires_grad`` and train/eval modes come back with :func:`load`; gradients, Python attributes that were changed since
    and the report of the run do not. It is written beside ``path`` and then renamed, so a failure leaves what was there.

    Args:
        pruned: what :func:`stp_fx.prune_graph` and the like returned, or any traced graph.
        path: where to; an existing file is replaced.

    Raises:
        InputError: ``pruned`` carries no record of what was done to it.
        FileError: a tensor that cannot be stored, or a file that cannot be written; names it.

    Example:
        >>> import os, stp_fx, tempfile
        >>> from torch import nn, randn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> pruned = stp_fx.prune_graph(net, ratio=0.5, example_inputs=randn(1, 3, 8, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pruned, os.path.join(folder, "small.safetensors"))
        ...     again = stp_fx.load(os.path.join(folder, "small.safetensors"), net)
        >>> again.get_parameter("0.weight").shape
        torch.Size([4, 3, 3, 3])
    """
    target = path_of(path)
    if not isinstance(pruned, nn.Module) or not has_provenance(pruned):
        raise InputError(_not_a_graph(pruned))
    stored, state = stored_tensors(pruned), provenance_of(pruned)
    tensors = {name: _plain(name, each.tensor) for name, each in stored.items()}
    write_file(target, tensors, encode(_contents(pruned, state, stored), tensors))


def _contents(gm: fx.GraphModule, state: Provenance, stored: Mapping[str, Stored]) -> Contents:
    orders = {name: order_of(each.tensor) for name, each in stored.items()}
    return Contents(
        plan=(PrunePlan({}, {}) if state.plan is None else state.plan).to_json(),
        masked=None if state.masked is None else state.masked.to_json(),
        original={name: _original_size(each, state) for name, each in stored.items() if name not in state.added},
        ties={other: name for name, each in stored.items() for other in each.names[1:]},
        added=state.added,
        complex=tuple(name for name, each in stored.items() if each.tensor.is_complex()),
        order={name: order for name, order in orders.items() if order is not None},
        frozen=tuple(name for name, each in stored.items() if each.is_parameter and not each.tensor.requires_grad),
        training=gm.training,
        other=tuple(name for name, module in gm.named_modules() if module.training != gm.training),
        call=None if state.call is None else state.call.following(state.dtype, floating_dtype(gm)),
        basis=state.basis,
        turned=state.turned,
    )


def _original_size(stored: Stored, state: Provenance) -> tuple[int, ...]:
    """A tensor's sizes before anything was removed.

    Raises:
        FileError: its size is not what the plan left.
    """
    sizes = [int(size) for size in stored.tensor.shape]
    plan = PrunePlan({}, {}) if state.plan is None else state.plan
    for dim in range(len(sizes)):
        key = next(((name, dim) for name in stored.names if (name, dim) in plan.kept), None)
        if key is not None:
            left = len(plan.kept[key])
            if left != sizes[dim]:
                raise FileError(
                    f"{key[0]!r} dim {dim} has {sizes[dim]} positions and the plan left {left}: the network was changed since; "
                    "trace it anew, and save that"
                )
            sizes[dim] = plan.sizes[key]
    return tuple(sizes)


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A real, dense tensor of its own memory on the CPU.

    Raises:
        FileError: the tensor has no values, or no dense form.
    """
    value = tensor.detach()
    if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_quantized or value.is_meta:
        what = "has no values (it is on the meta device)" if value.is_meta else f"is a {type(value).__name__} of {value.layout}"
        raise FileError(f"{name!r} {what}: only dense tensors with values can be saved")
    if value.dtype is torch.complex32:
        raise FileError(f"{name!r} is of complex32, which torch itself hardly supports: convert it to complex64")
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    value = value.resolve_neg().cpu().contiguous()
    alone = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if alone and value.data_ptr() != 0 else value.clone()  # safetensors refuses views of one memory


def _not_a_graph(given: Any) -> str:
    if not isinstance(given, nn.Module):
        return f"`pruned` is a {type(given).__name__}; give a graph of stp_fx"
    parts = [name for name, module in given.named_modules() if name and has_provenance(module)]
    if parts:
        return (
            f"{type(given).__name__} is no traced graph, but its part {parts[0]!r} is: save that, "
            f"stp_fx.save(model.get_submodule({parts[0]!r}), path), and the rest with torch.save(model.state_dict(), ...)"
        )
    return f"{type(given).__name__} carries no record of a capture: give what stp_fx.trace or stp_fx.prune_graph returned"
