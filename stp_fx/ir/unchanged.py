"""Whether a graph is as it was: a cheap look at everything that a pass could write to."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from stp_fx.ir.patches import LOCK
from stp_fx.ir.stamp import weights_of

__all__ = ["Unchanged"]


class Unchanged:
    """Remembers a graph as it is; :meth:`difference` tells what has been written to since.

    Nodes, tensors and ``meta`` are compared by identity, numbers in tensors by version and a few values.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph_module = gm
        self._before = _look(gm)

    def difference(self) -> str | None:
        """The first thing that differs, in words; None if nothing does."""
        for what, now in _look(self.graph_module).items():
            if not _same(self._before[what], now):
                return what
        return None


def _look(gm: fx.GraphModule) -> dict[str, Any]:
    with LOCK:  # a trace in another thread may run modules that this graph shares in another mode
        return _look_alone(gm)


def _look_alone(gm: fx.GraphModule) -> dict[str, Any]:
    modules = list(gm.modules())
    stores = [store for module in modules for store in (module._parameters, module._buffers)]
    tensors = [tensor for store in stores for tensor in store.values() if tensor is not None]
    return {
        "its nodes": [part for n in gm.graph.nodes for part in (n, n.target, n.args, n.kwargs)],
        "its code": gm.code,
        "its modules": modules,
        "a train/eval flag": [module.training for module in modules],
        "the objects of its tensors": tensors,
        "the names of its tensors": [name for store in stores for name in store],
        "requires_grad of a parameter": [tensor.requires_grad for tensor in tensors],
        "a gradient": [tensor.grad if tensor.is_leaf else None for tensor in tensors],
        "a number in a parameter or buffer": weights_of(tensors),
        "its meta": [*gm.meta, *gm.meta.values()],
        "torch's grad mode": torch.is_grad_enabled(),
    }


def _same(before: Any, now: Any) -> bool:
    if not isinstance(before, list):
        return bool(before == now)
    same = (a is b or (isinstance(a, (str, bool)) and a == b) for a, b in zip(before, now, strict=False))
    return len(before) == len(now) and all(same)
