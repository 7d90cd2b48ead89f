"""Statistics of the activation input of each contraction of a graph, over calibration data.

Report, section 1.3.3: for convolutions every spatial position is an observation, for linear layers every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from stp_fx.analysis.consumers import Consumer, find_consumers
from stp_fx.analysis.sites import Site, find_sites
from stp_fx.errors import InputError
from stp_fx.ir.as_it_was import as_it_was
from stp_fx.ir.modes import OneMode
from stp_fx.ir.stamp import Stamp, stamp_of
from stp_fx.ir.streamed import Streamed
from stp_fx.measure.calibration import arguments_of, batches, eval_twin
from stp_fx.measure.distributed import several_processes
from stp_fx.measure.moments import Moments, RunningMap, RunningMoments

__all__ = ["Statistics", "collect_statistics"]

Key = tuple[str, int, int]
"""Source node, dimension, and how often the value had been written to in place when it was read."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Moments at every activation input. Inputs that read one value share them.

    ``maps``: the mean over dimension 0 at an activation input, position by position (float64 [1, *rest]); ``patches``: the
    moments of the patch that one output position of a convolution reads, [in x taps], by the convolution's node. Both only where
    they were asked for; a map is None where batches had several shapes. ``stamp``: of the graph and weights measured.
    """

    moments: Mapping[Key, Moments]
    keys: Mapping[tuple[str, str, int], Key] = dataclasses.field(repr=False)
    maps: Mapping[Key, torch.Tensor | None] = dataclasses.field(default_factory=dict, repr=False)
    patches: Mapping[str, Moments] = dataclasses.field(default_factory=dict, repr=False)
    stamp: Stamp | None = dataclasses.field(default=None, repr=False)

    def __repr__(self) -> str:
        kinds = [name for name, there in (("maps", self.maps), ("patches", self.patches)) if there]
        return f"Statistics({len(self.moments)} values{' with ' + ' and '.join(kinds) if kinds else ''})"

    def of(self, site: Site) -> Moments:
        """The moments of an activation input, one entry for each position along its dimension.

        Raises:
            InputError: the site is not one of the graph that the statistics were collected on.
        """
        key = self.keys.get((site.reader, site.source, site.dim))
        if key is None:
            raise InputError(f"no statistics for {site.name}: they were collected on another graph; collect them again")
        return self.moments[key]

    def map_of(self, site: Site) -> torch.Tensor | None:
        """The mean map of an activation input, or None."""
        return self.maps.get(self.keys[site.reader, site.source, site.dim])


def collect_statistics(
    gm: fx.GraphModule,
    calibration: Iterable[Any] | torch.Tensor | None,
    *,
    covariance: bool = False,
    maps: bool = False,
    patches: int = 0,
    streamed: Streamed | None = None,
) -> Statistics:
    """Runs the batches through the graph in eval mode, without gradients, and observes every activation input.

    With ``covariance`` the full second moments are kept as well: float64 [channels, channels] an input; with ``maps`` the
    mean maps; with ``patches`` the full second moments of the patches that convolutions read, where a patch has at most
    so many values. Under ``torch.distributed`` every rank gives its own batches and gets the statistics of all. ``streamed``: a
    copy of ``gm``, which may then be on the meta device, that is run in its place; its tensors are read anew for every batch.

    Raises:
        InputError: no batch, none with a sample, one that does not fit, or a value that is not finite: names the first
            activation input that has one.
    """
    reader = _Sites(gm, covariance, maps, patches, streamed)
    with torch.no_grad():
        run = gm if streamed is None else streamed.module
        for number, batch in enumerate(batches(run, calibration, "collecting statistics")):
            reader.read(arguments_of(gm, batch), number)
    for (source, dim, _), running in reader.running.items():
        if not running.count:
            raise InputError(f"the calibration batches are empty: nothing was observed at {source}:{dim}")
    if several_processes():
        for running in (*reader.running.values(), *reader.maps.values(), *reader.patches.values()):
            running.reduce()
    return Statistics(
        {key: running.result() for key, running in reader.running.items()},
        reader.keys,
        {key: running.result() for key, running in reader.maps.items()},
        {node: running.result() for node, running in reader.patches.items()},
        stamp_of(gm),
    )


class _Sites:
    """The statistics of what the consumers of a graph read, over all batches."""

    def __init__(self, gm: fx.GraphModule, covariance: bool, maps: bool, patches: int, streamed: Streamed | None = None) -> None:
        self.running: dict[Key, RunningMoments] = {}
        self.keys: dict[tuple[str, str, int], Key] = {}
        self.maps: dict[Key, RunningMap] = {}
        self.patches: dict[str, RunningMoments] = {}
        self._with_maps = maps
        self._unfolded = _unfolded(gm, patches) if patches else {}
        self._covariance = covariance
        self._number = 0
        self._streamed = streamed
        run = gm if streamed is None else streamed.module
        self._nodes = {node.name: node for node in run.graph.nodes}
        self._seen: set[Key] = set()
        sites: dict[str, list[Site]] = {}
        for site in find_sites(gm).all:
            sites.setdefault(site.reader, []).append(site)
        self._evaluation = _Reader(self, run, sites)
        trained = {name: sites.pop(name) for name in {n.name for n in self._evaluation.left_out} & sites.keys()}
        # Nodes of training alone are run as well, after evaluation, for the consumers among them.
        self._training = _Reader(self, run, trained, training=True) if trained else None

    def read(self, arguments: tuple[Any, ...], number: int) -> None:
        self._number = number
        self._seen.clear()
        self._evaluation.run(*arguments)
        if self._training is not None:
            with as_it_was(self._training.module):
                self._training.run(*arguments)

    def run_node(self, node: fx.Node, run: Callable[[fx.Node], Any]) -> Any:
        """One node; of a streamed graph, with what it reads."""
        if self._streamed is None or node.op == "get_attr":
            return run(node)
        self._streamed.load(node)
        value = self._streamed.own(run(node))
        self._streamed.release()
        return value

    def look(self, site: Site, env: Mapping[fx.Node, Any]) -> None:
        """One activation input of the run that ``env`` belongs to."""
        value = env[self._nodes[site.source]]
        consumer = self._unfolded.get(site.reader)
        unfolded = None if consumer is None else consumer.patches(value)
        if unfolded is not None:
            self.patches.setdefault(site.reader, RunningMoments(1, covariance=True)).add(unfolded)
        key = (site.source, site.dim, int(value._version))
        known = self.keys.setdefault((site.reader, site.source, site.dim), key)
        if known in self._seen:
            return
        self._seen.add(known)
        if known not in self.running:
            self.running[known] = RunningMoments(site.dim, self._covariance)
            if self._with_maps:
                self.maps[known] = RunningMap()
        if known in self.maps:
            self.maps[known].add(value)
        if not self.running[known].add(value):
            raise InputError(f"calibration batch {self._number}: {site.name} holds values that are not finite")


class _Reader(OneMode):
    """Runs one mode's nodes, in evaluation, and hands each consumer's input to its statistics first."""

    def __init__(self, sites: _Sites, gm: fx.GraphModule, wanted: Mapping[str, list[Site]], training: bool = False) -> None:
        super().__init__(eval_twin(gm), gm.graph, training)
        self._sites, self._wanted = sites, wanted

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.left_out:
            for site in self._wanted.get(n.name, ()):
                self._sites.look(site, self.env)
        return self._sites.run_node(n, super().run_node)


def _unfolded(gm: fx.GraphModule, limit: int) -> dict[str, Consumer]:
    """Convolutions with several taps whose patches have at most ``limit`` values."""
    found = {}
    for consumer in find_consumers(gm):
        _, _, into, taps = consumer.matrix(consumer.current(gm)).shape
        if not consumer.transposed and taps > 1 and consumer.groups * into * taps <= limit:
            found[consumer.node] = consumer
    return found
