"""Tensors that processes hold in shards, read one at a time, and a graph in shards made of a graph without shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from stp_fx.errors import InputError
from stp_fx.ir.sharded import fsdp_modules, is_sharded, is_vector, local_part, without_wrappers
from stp_fx.ir.streamed import Streamed, stand_ins
from stp_fx.measure.distributed import gathered, meet
from stp_fx.rewrite.slicing import copied
from stp_fx.training.arguments import wrapped

__all__ = ["Alike", "Shards", "resharded", "streamed_copy", "structure_of_shards", "whole_tensor"]


def whole_tensor(tensor: Any) -> torch.Tensor:
    """The whole of a DTensor, on every process, which all have to ask for it; any other tensor as it is."""
    if not hasattr(tensor, "placements"):
        return tensor.detach()
    meet()  # who waits here learns of the failure of another; who waits inside of `full_tensor` does not
    return tensor.detach().full_tensor()


class Shards(Mapping[str, torch.Tensor]):
    """The values of the parameters and buffers of a module, by all of their names: each is gathered when it is asked for, by all
    processes alike, and only the last is kept. ``written`` stands in place of parameters of these names."""

    def __init__(self, module: nn.Module, written: Mapping[str, torch.Tensor] | None = None) -> None:
        self._tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
        self._written = {id(self._tensors[name]): tensor for name, tensor in (written or {}).items()}
        self._last: tuple[int, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if self._last is None or self._last[0] != id(tensor):
            self._last = None
            self._last = id(tensor), whole_tensor(self._written.get(id(tensor), tensor))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def let_go(self) -> None:
        """Lets the last tensor go."""
        self._last = None


class Alike:
    """A loader, of which every process must have as many batches: each batch gathers all parameters.

    Raises:
        InputError: on all processes, where one has no more batches and another has.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        number, end = 0, object()
        batches = iter(self._loader)
        while True:
            batch = next(batches, end)
            there = gathered(batch is not end)
            if not all(there):
                if any(there):
                    raise InputError(
                        f"rank {there.index(False)} has {number} batches, and rank {there.index(True)} has more: of a sharded "
                        "model every rank needs as many (DistributedSampler, drop_last=True)"
                    )
                return
            number += 1
            yield batch


def structure_of_shards(model: fx.GraphModule) -> fx.GraphModule:
    """A copy without wrappers, whose sharded parameters are on the meta device. Those with one number a channel are whole, as is
    everything that is not sharded. To be called by all processes."""
    for module in fsdp_modules(model).values():
        module.reshard()  # after a forward without a backward, parameters of the root are still gathered
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        whole = not hasattr(tensor, "placements") or not isinstance(tensor, nn.Parameter) or is_vector(tensor)
        data = whole_tensor(tensor) if whole else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(data.clone(), requires_grad=tensor.requires_grad) if parameter else data.clone()
    return copied(without_wrappers(model), memo)


def streamed_copy(
    graph: fx.GraphModule,
    device: torch.device,
    read: Callable[[str], torch.Tensor],
    write: Callable[[str, torch.Tensor], None] | None = None,
) -> Streamed:
    """A copy of a graph, whose parameters on the meta device are read when nodes need them."""
    own = copied(graph)
    names = _on_meta(own)
    wanted = {name: p.requires_grad for name, p in own.named_parameters()}
    host = copied(own, stand_ins(own, names, device))
    for name, parameter in host.named_parameters():
        parameter.requires_grad_(wanted[name])
    return Streamed(host, names, lambda name: read(name).clone(), write)


def _on_meta(graph: nn.Module) -> set[str]:
    return {name for name, p in graph.named_parameters(remove_duplicate=False) if p.is_meta}


def resharded(
    graph: fx.GraphModule, wrap: Callable[[nn.Module], nn.Module], values: Callable[[str], torch.Tensor], device: torch.device
) -> tuple[fx.GraphModule, nn.Module]:
    """The graph in shards, and what ``wrap`` gave: it is wrapped on the meta device, and filled tensor by tensor. ``values``
    gives those that ``graph`` has on the meta device, by their first name.

    Raises:
        InputError: ``wrap`` fails, or shards nothing.
    """
    memo: dict[int, Any] = {}
    for p in graph.parameters():
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
    result = copied(graph, memo)
    ties = _ties(result)
    parallel = wrapped(result, wrap)
    if not is_sharded(result):
        raise InputError("`wrap` is called with the graph after each change, and shards its parameters; this one shards none")
    result.to_empty(device=device)
    for first, others in ties.items():
        for name in others:
            owner, _, own = name.rpartition(".")
            result.get_submodule(owner)._parameters[own] = result.get_parameter(first)
    known = dict(graph.named_parameters())
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            whole = values(name) if known[name].is_meta else known[name].detach()
            _fill(parameter, whole.to(device))
        for name, buffer in graph.named_buffers():
            _fill(result.get_buffer(name), buffer)
    return result, parallel


def _fill(tensor: Any, whole: torch.Tensor) -> None:
    if hasattr(tensor, "placements"):
        tensor.to_local().copy_(local_part(whole, tensor))
    else:
        tensor.copy_(whole)


def _ties(module: nn.Module) -> dict[str, list[str]]:
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            found.setdefault(known, []).append(name)
    return found
