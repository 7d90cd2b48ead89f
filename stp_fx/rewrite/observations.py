"""What a layer reads and what its output lacks, as rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stp_fx.analysis.consumers import Consumer

__all__ = ["observations"]

_PER_INPUT = 64


def observations(
    layer: Consumer, weight: torch.Tensor, source: torch.Tensor, lacking: Sequence[torch.Tensor], rows: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [groups, n, in * taps] and ``r`` [groups, n, out], one row for each output position; of several ``lacking``
    outputs (of layers that read one value) the channels beside each other.

    Of more than ``rows`` positions, or 64 for each input if that is more, so many are drawn at random.
    """
    groups, _, into, taps = layer.matrix(weight).shape
    if layer.windows is not None and source.dim() == len(layer.windows.kernel) + 1:  # an image without a batch
        source, lacking = source[None], [each[None] for each in lacking]
    flat = [each.movedim(layer.channel, -1).reshape(-1, each.shape[layer.channel]) for each in lacking]
    total = flat[0].shape[0]
    wanted = max(rows, _PER_INPUT * into * taps)
    index = None
    if total > wanted:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(total, generator=generator)[:wanted].sort().values.to(source.device)
    parts = [(each if index is None else each[index]).reshape(-1, groups, each.shape[1] // groups) for each in flat]
    r = _float(torch.cat(parts, 2).movedim(1, 0))
    if layer.windows is None:
        x = source.movedim(layer.site.dim, -1).reshape(-1, source.shape[layer.site.dim])
        return _float(x if index is None else x[index])[None], r
    windows = layer.windows.over(source)
    rank = len(layer.windows.kernel)
    places = lacking[0].movedim(layer.channel, -1).shape[:-1]
    chosen = torch.arange(total, device=source.device) if index is None else index
    sample, *spots = torch.unravel_index(chosen, places)
    x = windows.movedim(1, -rank - 1)[(sample, *spots)]
    return _float(x.reshape(len(chosen), groups, into * taps).movedim(1, 0)), r


def _float(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
