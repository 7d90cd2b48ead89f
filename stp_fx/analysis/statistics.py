"""Statistics at the sites of a graph: what each contraction reads, over calibration data.

Report, section 1.3.3: for convolutions every spatial position is an observation, for linear layers every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from stp_fx.analysis.calibration import arguments_of, batches, evaluating
from stp_fx.analysis.moments import Moments, RunningMoments
from stp_fx.analysis.sites import Site, find_sites
from stp_fx.errors import InputError

__all__ = ["Statistics", "collect_statistics"]

Key = tuple[str, int, int]
"""Source node, dimension, and how often the value had been written to in place when it was read."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of what every site reads. Sites that read one value share them."""

    moments: Mapping[Key, Moments]
    keys: Mapping[tuple[str, str, int], Key] = dataclasses.field(repr=False)

    def of(self, site: Site) -> Moments:
        """The moments of a site, one entry for each position along its dimension.

        Raises:
            InputError: the site is not one of the graph that the statistics were collected on.
        """
        key = self.keys.get((site.reader, site.source, site.dim))
        if key is None:
            raise InputError(f"no statistics for {site.name}: they were collected on another graph; collect them again")
        return self.moments[key]


def collect_statistics(
    gm: fx.GraphModule, calibration: Iterable[Any] | torch.Tensor | None, *, covariance: bool = False
) -> Statistics:
    """Runs the batches through the graph in eval mode, without gradients, and reads every site.

    With ``covariance`` the full second moments are kept as well: float64 [channels, channels] a site. Under
    ``torch.distributed`` every rank gives its own batches and gets the statistics of all.

    Raises:
        InputError: no batch, none with a sample, one that does not fit, or a value that is not finite: names the first
            site that has one.
    """
    reader = _SiteReader(gm, covariance)
    with torch.no_grad(), evaluating(gm):
        for number, batch in enumerate(batches(gm, calibration, "collecting statistics")):
            reader.read(arguments_of(gm, batch), number)
    for (source, dim, _), running in reader.running.items():
        if not running.count:
            raise InputError(f"the calibration batches are empty: nothing was observed at {source}:{dim}")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for running in reader.running.values():
            running.reduce()
    return Statistics({key: running.result() for key, running in reader.running.items()}, reader.keys)


class _SiteReader(fx.Interpreter):
    """Runs a graph and looks at what each site's reader is about to read."""

    def __init__(self, gm: fx.GraphModule, covariance: bool) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.running: dict[Key, RunningMoments] = {}
        self.keys: dict[tuple[str, str, int], Key] = {}
        self._covariance = covariance
        self._number = 0
        self._sites: dict[str, list[Site]] = {}
        for site in find_sites(gm).all:
            self._sites.setdefault(site.reader, []).append(site)
        self._nodes = {node.name: node for node in gm.graph.nodes}
        self._seen: set[Key] = set()

    def read(self, arguments: tuple[Any, ...], number: int) -> None:
        self._number = number
        self._seen.clear()
        self.run(*arguments)

    def run_node(self, n: fx.Node) -> Any:
        for site in self._sites.get(n.name, ()):
            self._look(site)
        return super().run_node(n)

    def _look(self, site: Site) -> None:
        value = self.env[self._nodes[site.source]]
        key = (site.source, site.dim, int(value._version))
        known = self.keys.setdefault((site.reader, site.source, site.dim), key)
        if known in self._seen:
            return
        self._seen.add(known)
        if known not in self.running:
            self.running[known] = RunningMoments(site.dim, self._covariance)
        if not self.running[known].add(value):
            raise InputError(f"calibration batch {self._number}: {site.name} holds values that are not finite")
