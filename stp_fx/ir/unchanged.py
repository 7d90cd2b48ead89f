"""Whether a graph is as it was: a cheap look at everything that a pass could write to."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from stp_fx.ir.stamp import stamp_of

__all__ = ["Unchanged"]


class Unchanged:
    """Remembers a graph as it is; :meth:`difference` tells what has been written to since.

    Nodes, tensors and ``meta`` are compared by identity, numbers in tensors by version and a few values.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._before = _look(gm)

    def difference(self) -> str | None:
        """The first thing that differs, in words; None if nothing does."""
        for what, now in _look(self._gm).items():
            if not _same(self._before[what], now):
                return what
        return None


def _look(gm: fx.GraphModule) -> dict[str, Any]:
    modules = dict(gm.named_modules())
    tensors = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    return {
        "its nodes": [part for n in gm.graph.nodes for part in (n, n.target, n.args, n.kwargs)],
        "its code": gm.code,
        "its modules": list(modules.values()),
        "a train/eval flag": [module.training for module in modules.values()],
        "the names or objects of its tensors": [*tensors, *tensors.values()],
        "requires_grad of a parameter": [t.requires_grad for t in tensors.values()],
        "a gradient": [t.grad if t.is_leaf else None for t in tensors.values()],
        "a number in a parameter or buffer": stamp_of(gm).weights,
        "its meta": [*gm.meta, *gm.meta.values()],
        "torch's grad mode": torch.is_grad_enabled(),
    }


def _same(before: Any, now: Any) -> bool:
    if not isinstance(before, list):
        return bool(before == now)
    return len(before) == len(now) and all(
        a is b or (isinstance(a, (str, bool)) and a == b) for a, b in zip(before, now, strict=True)
    )
