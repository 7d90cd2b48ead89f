"""Values of which a graph reads no number, only sizes: ``x[..., -1].shape``, ``torch.zeros_like(x[:, 0])``."""

from __future__ import annotations

import torch
from torch import fx

__all__ = ["unread"]

_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "itemsize", "nbytes", "requires_grad"}
_METHODS = {
    "size", "dim", "numel", "ndimension", "nelement", "stride", "is_floating_point", "is_complex", "element_size", "get_device",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
}  # fmt: skip
_FUNCTIONS = {
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
    torch.numel, torch.is_floating_point, torch.is_complex, len,
}  # fmt: skip


def unread(graph: fx.Graph) -> frozenset[str]:
    """The names of these nodes; also of those that nobody reads at all."""
    return frozenset(node.name for node in graph.nodes if node.op != "output" and all(_asks(user, node) for user in node.users))


def _asks(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` takes ``node`` as its first operand alone, for a size or a kind."""
    if node in user.args[1:] or node in user.kwargs.values() or not user.args or user.args[0] is not node:
        return False
    if user.op == "call_method":
        return user.target in _METHODS
    if user.op != "call_function":
        return False
    return user.args[1] in _ATTRIBUTES if user.target is getattr else user.target in _FUNCTIONS
