"""The nodes that read a stored tensor, under any of its names; some of them can be given a tensor of their own."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx, nn

from stp_fx.errors import NothingToRotateError
from stp_fx.ir.shapes import fetch

__all__ = ["names_of", "readers_of", "untied"]


def names_of(gm: fx.GraphModule, name: str) -> set[str]:
    """All names of a parameter or buffer."""
    tensor = fetch(gm, name)
    named = (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    return {other for other, each in named if each is tensor}


def readers_of(gm: fx.GraphModule, name: str) -> dict[fx.Node, str]:
    """The calls that read a stored tensor, each with the name under which it does."""
    names = names_of(gm, name)
    found: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target in names:
            found.update((user, str(node.target)) for user in node.users)
        elif node.op == "call_module":
            own = next((n for n in names if n.startswith(f"{node.target}.")), None)
            if own is not None:
                found[node] = own
    return found


def untied(gm: fx.GraphModule, name: str, nodes: Collection[fx.Node]) -> str:
    """Gives the calls ``nodes`` a copy of a tied parameter, in place; returns the name under which they read it.

    Raises:
        NothingToRotateError: another call reads it under the same name.
    """
    readers = readers_of(gm, name)
    wanted = {readers[node] for node in nodes}
    shared = next((node for node, own in readers.items() if own in wanted and node not in nodes), None)
    if shared is not None:
        raise NothingToRotateError(f"'{name}' is also read by node '{shared.name}', which must read it as it is")
    old = gm.get_parameter(name)
    new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
    for each in wanted:
        owner, _, own = each.rpartition(".")
        module: torch.nn.Module = fetch(gm, owner) if owner else gm
        module.register_parameter(own, new)
    return min(wanted)
