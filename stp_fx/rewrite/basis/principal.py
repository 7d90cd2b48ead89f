"""The basis of a stream's principal components, from data or from the weights alone; the first channel has the most energy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from stp_fx.analysis.carriers import Carrier, carriers_of_value
from stp_fx.measure.second_moments import second_moments
from stp_fx.rewrite.basis.streams import Stream, Touched
from stp_fx.rules import TensorDims

__all__ = ["principal_basis"]


def principal_basis(
    gm: fx.GraphModule, stream: Stream, touched: Touched, calibration: Iterable[Any] | torch.Tensor | None
) -> torch.Tensor:
    """An orthogonal matrix [channels, channels] whose columns are the principal directions of the stream, largest first.

    With data: of the uncentred second moments of what the stream's norms give, each norm weighing alike; consumers read these
    values, and what is removed is what they lose. (SliceGPT takes a matrix for each block, which needs one in every skip
    connection; here one serves all.) Without data: of what the weights write into the stream for white inputs.
    """
    moments = _of_weights(touched) if calibration is None else _of_data(gm, stream, touched, calibration)
    _, vectors = torch.linalg.eigh(moments)
    return vectors.flip(1)


def _of_data(gm: fx.GraphModule, stream: Stream, touched: Touched, calibration: Iterable[Any] | torch.Tensor) -> torch.Tensor:
    wanted: dict[str, tuple[str, tuple[Carrier, ...]]] = {}
    for norm in stream.norms:
        value = touched.graph.value(norm.node.name)
        if isinstance(value, TensorDims):
            name = norm.node.name
            wanted[name] = name, carriers_of_value(touched.graph, name, value, stream.units)
    found = second_moments(gm, calibration, wanted, "finding principal components")
    return torch.stack(list(found.values())).mean(0)


def _of_weights(touched: Touched) -> torch.Tensor:
    """The sum over all tensors that write into the stream of the mean of their outer products."""
    outputs = {(axis.tensor, axis.dim) for axis in touched.graph.axes if axis.role != "weight" or axis.side in ("out", "")}
    total: torch.Tensor | None = None
    for name, carriers in touched.axes.items():
        for carrier in carriers:
            if (name, carrier.dim) in outputs:
                index = torch.from_numpy(carrier.positions)
                tensor = touched.probe.tensors[name].detach().cpu()
                rows = tensor.movedim(carrier.dim, -1)[..., index].reshape(-1, index.shape[1])
                outer = rows.T @ rows
                total = outer if total is None else total + outer
    assert total is not None
    return total
