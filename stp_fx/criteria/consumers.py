"""The weights that read a site, laid out by the site's positions: what a reconstruction has to keep apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from stp_fx.analysis.build import analyze
from stp_fx.analysis.graph import ChannelGraph
from stp_fx.analysis.propagate import AxisRecord
from stp_fx.analysis.sites import Site
from stp_fx.criteria.base import ScoreContext
from stp_fx.errors import CriterionError
from stp_fx.rules import dim_size
from stp_fx.rules.literals import TensorDims

__all__ = ["Consumer", "consumers_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class Consumer:
    """One weight that reads a site of ``size`` positions.

    ``rows`` is the weight with its input axis in front, [columns, outputs * taps]; position p of the site is read by
    column ``p % columns`` of convolution group ``p // (size / groups)``. In a convolution of several groups a column is
    used by each of them, for outputs of its own (``parts[g]`` is the slice of outputs * taps that belongs to group g); a
    transposed one has a column for every position.
    """

    rows: torch.Tensor
    size: int
    groups: int

    def gram(self, positions: np.ndarray) -> torch.Tensor:
        """Inner products of the weights of the given positions, float64 [positions, positions]; between convolution
        groups, which share no output, they are 0."""
        at = torch.from_numpy(positions).to(self.rows.device)
        columns, width = self.rows.shape
        if columns == self.size:
            chosen = self.rows[at]
        else:
            parts = self.rows.reshape(columns, self.groups, width // self.groups)
            chosen = parts[at % columns, at // columns]
        return (chosen @ chosen.T).cpu() * self.together(positions)

    def together(self, positions: np.ndarray) -> torch.Tensor:
        """1 where two positions are read by one convolution group, else 0: float64 [positions, positions]."""
        group = torch.from_numpy(positions // (self.size // self.groups))
        return (group[:, None] == group[None, :]).double()


def consumers_of(site: Site, context: ScoreContext) -> list[Consumer]:
    """The weights that read ``site``; empty where activations meet, or where the weight is computed before it is used.

    Raises:
        CriterionError: a weight whose input axis does not fit the site.
    """
    graph = analyze(context.graph_module())
    return [_consumer(site, name, graph, context) for name in site.weights]


def _consumer(site: Site, name: str, graph: ChannelGraph, context: ScoreContext) -> Consumer:
    axis = _input_axis(site, graph.found.aliases.get(name, name), graph)
    weight = context.tensor(name).detach()
    columns = weight.shape[axis.dim]
    if site.size % columns:
        raise CriterionError(
            f"{name!r} has {columns} input columns, which does not divide the {site.size} positions of {site.name}; "
            "put the layer in `ignore`, or use another criterion"
        )
    groups = site.size // columns
    if axis.dim == 0 and weight.dim() > 2:  # transposed convolution: [in, out / groups, *kernel]
        groups = _outputs(site, graph) // weight.shape[1]
    rows = weight.movedim(axis.dim, 0).reshape(columns, -1)
    device = torch.device("cpu") if rows.device.type == "mps" else rows.device  # no float64 there
    return Consumer(rows.to(device, torch.float64), site.size, groups)


def _input_axis(site: Site, name: str, graph: ChannelGraph) -> AxisRecord:
    """The axis of the weight that the site's units are on; of several, the one on which they lie as on the site."""
    best, most = None, -1
    for axis in graph.found.axes:
        if axis.tensor != name or axis.side not in ("in", "both"):
            continue
        _, unit = graph.touched.of(graph.solution.label[axis.ids])
        alike = len(np.intersect1d(unit, site.unit)) + (len(axis.ids) == site.size)
        if alike > most:
            best, most = axis, alike
    if best is None:
        raise CriterionError(f"no input axis of {name!r} was found, though it reads {site.name}; use another criterion")
    return best


def _outputs(site: Site, graph: ChannelGraph) -> int:
    value = graph.value(site.reader)
    assert isinstance(value, TensorDims)
    return dim_size(value.dims[site.dim])
