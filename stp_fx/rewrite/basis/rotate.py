"""Rotates a stream: RMSNorm commutes with an orthogonal matrix, and everything else is linear (SliceGPT, arXiv 2401.15024)."""

from __future__ import annotations

import torch
from torch import fx

from stp_fx.analysis.carriers import Carrier
from stp_fx.rewrite.basis.probe import Probe, applied
from stp_fx.rewrite.basis.streams import Stream, Touched
from stp_fx.rewrite.basis.write import write_tensors

__all__ = ["check_rotation", "rotate"]


def check_rotation(stream: Stream, probe: Probe) -> Touched:
    """The tensors and nodes that a rotation of ``stream`` touches.

    Raises:
        NothingToRotateError: a node does not commute with a rotation of its channels; names the first.
    """
    touched = Touched(probe, stream.units)
    draws = torch.Generator().manual_seed(1)
    matrix = torch.linalg.qr(torch.randn(stream.size, stream.size, generator=draws, dtype=torch.float64))[0]

    def change(tensor: torch.Tensor, carriers: tuple[Carrier, ...]) -> torch.Tensor:
        return applied(tensor, carriers, matrix)

    for node in touched.nodes():
        if not touched.commutes(node, change):
            raise touched.refused(node, "treats the channels one by one, so they cannot be rotated")
    return touched


def rotate(gm: fx.GraphModule, touched: Touched, matrix: torch.Tensor) -> None:
    """Replaces the channels x of a stream by x ``matrix`` [channels, channels], which is orthogonal, in place."""
    write_tensors(gm, touched, lambda tensor, carriers: applied(tensor, carriers, matrix))
