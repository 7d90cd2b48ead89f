"""Second moments of chosen values, over calibration data: what principal components are made of."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import fx

from stp_fx.analysis.carriers import Carrier
from stp_fx.errors import InputError, translated
from stp_fx.ir.modes import OneMode
from stp_fx.measure.calibration import arguments_of, batches, eval_twin
from stp_fx.measure.distributed import several_processes, summed

__all__ = ["second_moments"]

Key = TypeVar("Key", bound=Hashable)
Wanted = Mapping[Key, tuple[str, tuple[Carrier, ...]]]
"""Nodes, and where the channels are in their values, by keys of the caller's."""


def second_moments(
    gm: fx.GraphModule, calibration: Iterable[Any] | torch.Tensor, wanted: Wanted[Key], what: str
) -> dict[Key, torch.Tensor]:
    """The mean of x x^T, uncentred, over all positions of the values of the nodes ``wanted``: float64 [channels, channels] each.

    The graph runs in eval mode, without gradients. Blocks of a carrier are observations of the same channels. Under
    ``torch.distributed`` every rank gives its own batches and gets the moments of all.

    Raises:
        InputError: no batch, one that does not fit, or a value that is not finite.
    """
    reader = _Reader(gm, wanted)
    with torch.no_grad():
        for number, batch in enumerate(batches(gm, calibration, what)):
            with translated(InputError, lambda said: f"{what} fails at calibration batch {number} with {said}"):  # noqa: B023
                reader.run(*arguments_of(gm, batch))
    result: dict[Key, torch.Tensor] = {}
    for key, (name, _) in wanted.items():
        if key not in reader.totals:
            continue
        total = reader.totals[key]
        count = summed(reader.counts[key], [total]) if several_processes() else reader.counts[key]
        result[key] = (total / max(count, 1)).cpu()
        if not bool(result[key].isfinite().all()):
            raise InputError(f"{what}: the calibration data gives values at node '{name}' that are not finite")
    return result


class _Reader(OneMode):
    """Runs evaluation's nodes and sums outer products of the wanted values."""

    def __init__(self, gm: fx.GraphModule, wanted: Wanted[Any]) -> None:
        super().__init__(eval_twin(gm), gm.graph)
        self._wanted: dict[str, list[tuple[Any, Carrier]]] = {}
        for key, (name, carriers) in wanted.items():
            self._wanted.setdefault(name, []).extend((key, carrier) for carrier in carriers)
        self.totals: dict[Any, torch.Tensor] = {}
        self.counts: dict[Any, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self.left_out:
            for key, carrier in self._wanted.get(n.name, ()):
                self._add(key, value, carrier)
        return value

    def _add(self, key: Hashable, value: torch.Tensor, carrier: Carrier) -> None:
        index = torch.from_numpy(carrier.positions).to(value.device)
        rows = value.detach().movedim(carrier.dim, -1)[..., index].reshape(-1, index.shape[1]).double()
        known = self.totals.setdefault(key, torch.zeros(index.shape[1], index.shape[1], dtype=torch.float64, device=value.device))
        known += rows.T @ rows
        self.counts[key] = self.counts.get(key, 0) + len(rows)
