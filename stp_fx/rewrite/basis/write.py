"""Writing a change of the channels into the stored tensors of a graph."""

from __future__ import annotations

import torch
from torch import fx

from stp_fx.rewrite.basis.probe import Change
from stp_fx.rewrite.basis.streams import Touched

__all__ = ["write_tensors"]


def write_tensors(gm: fx.GraphModule, touched: Touched, change: Change) -> None:
    """Replaces the values of all stored tensors that carry the stream, in place; their gradients are dropped."""
    named = dict(gm.named_parameters()) | dict(gm.named_buffers())
    with torch.no_grad():
        for name, carriers in touched.axes.items():
            tensor = named[name]
            tensor.copy_(change(tensor.detach().double(), carriers).to(tensor.dtype))
            tensor.grad = None
