"""Outputs in classes that a graph cannot write: flat in the graph, put together again by a module at its end."""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree
from torch import nn

from stp_fx.ir._torch_compat import children_of

__all__ = ["Rebuild", "is_plain"]

_PLAIN = (tuple, list, dict)


class Rebuild(nn.Module):
    """Puts flat outputs back into the classes that the model returned (dataclasses, Hugging Face's outputs)."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *values: Any) -> Any:
        return pytree.tree_unflatten(list(values), self.spec)


def is_plain(spec: pytree.TreeSpec) -> bool:
    """Whether a graph can write such an output itself."""
    return spec.is_leaf() or (spec.type in _PLAIN and all(is_plain(child) for child in children_of(spec)))
