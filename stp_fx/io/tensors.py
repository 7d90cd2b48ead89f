"""The tensors of a network by name, and the form in which a file holds them."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from stp_fx.errors import FileError
from stp_fx.ir.provenance import is_mask_buffer

__all__ = ["Stored", "kind_of", "order_of", "stored_tensors", "with_order"]


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A parameter or buffer under its first name, and every place that holds it: (module, its name there)."""

    tensor: torch.Tensor
    names: tuple[str, ...]
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.tensor, nn.Parameter)


def stored_tensors(module: nn.Module) -> dict[str, Stored]:
    """Parameters and then buffers, also those that no ``state_dict`` shows, but for masks, which a plan says."""
    names: dict[int, list[str]] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for store in ("_parameters", "_buffers"):
        for prefix, owner in module.named_modules(remove_duplicate=False):
            for name, tensor in owner.__dict__[store].items():
                full = f"{prefix}.{name}" if prefix else name
                if tensor is None or is_mask_buffer(full):
                    continue
                tensors[id(tensor)] = tensor
                names.setdefault(id(tensor), []).append(full)
                places.setdefault(id(tensor), []).append((owner, name))
    return {names[key][0]: Stored(tensor, tuple(names[key]), tuple(places[key])) for key, tensor in tensors.items()}


def kind_of(tensor: torch.Tensor) -> str:
    """The kind of number that a tensor holds, whatever its precision."""
    if tensor.dtype == torch.bool:
        return "bool"
    return "complex" if tensor.is_complex() else "floating" if tensor.is_floating_point() else "integer"


def order_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Dimensions from the slowest to the fastest in memory; None where that is their own order."""
    if tensor.is_contiguous():
        return None
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim)))
    return None if order == tuple(range(tensor.dim())) else order


def with_order(value: torch.Tensor, order: tuple[int, ...] | None, device: torch.device) -> torch.Tensor:
    """A copy of ``value`` in memory of its own, on ``device``.

    Raises:
        FileError: ``order`` is not one of its dimensions.
    """
    order = tuple(range(value.dim())) if order is None else order
    if sorted(order) != list(range(value.dim())):
        raise FileError(f"damaged: {str(order)[:80]} is no order of {value.dim()} dimensions")
    flat = torch.empty([value.shape[dim] for dim in order], dtype=value.dtype, device=device)
    result = flat.permute([order.index(dim) for dim in range(value.dim())])
    return result.copy_(value)
