"""Counterparts in a network and in the smaller one that a plan makes of it: positions of values, numbers of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.survivors import Survivors
from stp_fx.checks import shown
from stp_fx.errors import InputError
from stp_fx.ir.shapes import fetch
from stp_fx.rules import TensorDims

__all__ = ["KeptPositions", "calls_by_parameter", "checked_original", "take_over"]


class KeptPositions:
    """Of the values of a network, the positions that a plan keeps."""

    def __init__(self, graph: ChannelGraph, survivors: Survivors) -> None:
        self._graph, self._survivors = graph, survivors
        self._known: dict[str, dict[int, torch.Tensor]] = {}

    def of(self, node: str) -> dict[int, torch.Tensor]:
        """Of each dimension of a value that the plan shortens, the positions that are kept (int64)."""
        if node not in self._known:
            flags = self.flags(node)
            self._known[node] = {k: torch.from_numpy(np.flatnonzero(f)) for k, f in enumerate(flags) if not f.all()}
        return self._known[node]

    def flags(self, node: str) -> list[np.ndarray]:
        """Of each dimension of a value, which positions are kept (bool); nothing for what is no tensor."""
        dims = self._graph.value(node)
        return [self._survivors.flags(dim) for dim in dims.dims] if isinstance(dims, TensorDims) else []

    def is_whole(self, node: str) -> bool:
        """Whether the plan shortens no dimension of a value."""
        return not self.of(node)

    def take(self, node: str, value: torch.Tensor, whole: int | None = None) -> torch.Tensor:
        """The kept part of a value; of dimension ``whole``, everything."""
        for k, index in self.of(node).items():
            if k != whole:
                value = value.index_select(k, index.to(value.device))
        return value


def checked_original(gm: fx.GraphModule, original: fx.GraphModule | None) -> fx.GraphModule:
    """The network whose values a repair of ``gm`` is to reach: ``original``, or ``gm`` itself.

    Raises:
        InputError: ``original`` is not ``gm`` with other numbers: it lacks a node or a parameter, or has one of another shape.
    """
    if original is None or original is gm:
        return gm
    if not isinstance(original, fx.GraphModule):
        raise InputError(f"`original` is a GraphModule, as `trace` gives it; got {shown(original)}")
    names, ours = {node.name for node in original.graph.nodes}, dict(gm.named_parameters())
    theirs = dict(original.named_parameters())
    lost = [node.name for node in gm.graph.nodes if node.op != "get_attr" and node.name not in names]
    lost += [name for name, each in theirs.items() if name not in ours or ours[name].shape != each.shape]
    if lost:
        raise InputError(
            f"`original` is to be the network that was given, before its repair, with the same calls and shapes; they differ in "
            f"{', '.join(lost[:4])}"
        )
    return original


def take_over(
    result: fx.GraphModule,
    small: fx.GraphModule,
    survivors: Survivors,
    changed: Iterable[str],
    factors: Mapping[str, float] | None = None,
) -> None:
    """The kept positions of the tensors of ``result`` that have changed get the numbers of the small network.

    ``factors``: by which the removal will multiply some of them (:func:`stp_fx.rewrite.rms_norm.rms_scale_factors`).
    """
    for name in changed:
        whole, part = fetch(result, name), fetch(small, name).detach()
        index = [torch.from_numpy(survivors.kept(name, dim)).to(whole.device) for dim in range(whole.dim())]
        part = part / factors[name] if factors and name in factors else part
        whole[torch.meshgrid(*index, indexing="ij")] = part.to(whole)


def calls_by_parameter(gm: fx.GraphModule) -> dict[int, list[str]]:
    """By the ``id`` of each parameter, the calls that read it, under any of its names."""
    found: dict[int, list[str]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            for parameter in fetch(gm, str(node.target)).parameters():
                found.setdefault(id(parameter), []).append(node.name)
        elif node.op == "get_attr":
            found.setdefault(id(fetch(gm, str(node.target))), []).extend(user.name for user in node.users)
    return found
