"""Graphs that are larger than memory: each tensor is read when a node needs it, and let go again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx, nn

from stp_fx.ir.shapes import fetch, tensors_of

__all__ = ["Streamed", "stand_ins"]


def stand_ins(gm: fx.GraphModule, names: Collection[str], device: torch.device) -> dict[int, Any]:
    """By the ``id`` of each tensor of ``gm``, what takes its place in a copy that is run piece by piece.

    Tensors that have one of ``names`` are replaced by one NaN (zero for integers) that is expanded to their shape, so a tensor
    that is read without having been loaded shows. The others are moved to ``device``.
    """
    known = {id(tensor) for name, tensor in _named(gm) if name in names}
    memo: dict[int, Any] = {}
    for tensor in tensors_of(gm):
        data = _stand_in(tensor, device) if id(tensor) in known else tensor.detach().to(device)
        memo[id(tensor)] = nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
    return memo


def _stand_in(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    value = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0
    return torch.full((), value, dtype=tensor.dtype, device=device).expand(tensor.shape)


def _named(gm: fx.GraphModule) -> list[tuple[str, torch.Tensor]]:
    return [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]


class Streamed:
    """A graph whose tensors are in memory only from :meth:`load` to :meth:`release`.

    The objects stay the same all the time, and only their data changes: ties, twins of the modules and values that a run holds
    go on referring to them.

    Args:
        module: a copy that has :func:`stand_ins` in it.
        names: the tensors that are streamed, under all of their names.
        read: gives the data of a tensor by its first name, in the graph's dtype, on its device.
        write: is given the first name and the new data of a tensor that has been changed; ``read`` gives it from then on.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        names: Collection[str],
        read: Callable[[str], torch.Tensor],
        write: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        self.module = module
        self._read, self._write = read, write
        self._names: dict[int, str] = {}
        self._empty: dict[int, torch.Tensor] = {}
        for name, tensor in _named(module):
            if name in names and id(tensor) not in self._names:
                self._names[id(tensor)], self._empty[id(tensor)] = name, tensor.data
        self._loaded: dict[int, torch.Tensor] = {}
        self._needed = {node: self._read_by(node) for node in module.graph.nodes}

    def _read_by(self, node: fx.Node) -> list[torch.Tensor]:
        """The streamed tensors that a node reads."""
        found = tensors_of(fetch(self.module, str(node.target))) if node.op == "call_module" else []
        found += [fetch(self.module, str(each.target)) for each in node.all_input_nodes if each.op == "get_attr"]
        return [tensor for tensor in found if id(tensor) in self._names]

    def load(self, node: fx.Node) -> None:
        """Reads what ``node`` reads."""
        for tensor in self._needed[node]:
            self._load(tensor)

    def load_tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, with its data."""
        tensor = fetch(self.module, name)
        self._load(tensor)
        return tensor

    def _load(self, tensor: torch.Tensor) -> None:
        key = id(tensor)
        if key in self._names and key not in self._loaded:
            tensor.data = self._read(self._names[key])
            self._loaded[key] = tensor

    def own(self, value: Any) -> Any:
        """A node's value that is kept: not a streamed tensor itself, whose data will go, but an alias of the data."""
        return value.detach() if isinstance(value, torch.Tensor) and id(value) in self._names else value

    def keep(self, name: str) -> None:
        """Writes a tensor that has been changed."""
        assert self._write is not None
        tensor = self.load_tensor(name)
        self._write(self._names[id(tensor)], tensor.detach())

    def release(self) -> None:
        """Lets the data of all tensors go."""
        for key, tensor in self._loaded.items():
            tensor.data = self._empty[key]
        self._loaded.clear()
