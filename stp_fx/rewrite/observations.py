"""The inputs, outputs and desired outputs of a layer, as rows: one for each observed output position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from stp_fx.analysis.consumers import Consumer

__all__ = ["Direct", "Rows", "channel_dim", "direct", "why_not"]

_OWN = frozenset(
    cls.forward
    for cls in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
)


class Rows:
    """Output positions of a layer in one batch: all of them, or ``wanted`` that are drawn at random, each as likely.

    ``shape``: that of the layer's output, with its channels in dimension ``channel``; ``lone``: an image without a batch. Drawn
    positions stay in order, so that the first half of them lies in the first half of the batch.
    """

    def __init__(self, shape: torch.Size, layer: Consumer, wanted: int, seed: int, device: torch.device) -> None:
        self.lone = layer.windows is not None and len(shape) == len(layer.windows.kernel) + 1
        shape = torch.Size([1, *shape]) if self.lone else shape
        self._channel = layer.channel
        places = [*shape]
        del places[layer.channel]
        total = torch.Size(places).numel()
        self.count: int = min(total, wanted)
        self._spots: tuple[torch.Tensor, ...] | None = None
        if total > wanted:
            generator = torch.Generator().manual_seed(seed)
            index = torch.randperm(total, generator=generator)[:wanted].sort().values.to(device)
            self._spots = torch.unravel_index(index, places)

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """[n, channels] of a value that has the layer's output positions; in floating point of at least 32 bits."""
        value = (value[None] if self.lone else value).movedim(self._channel, -1)
        return _float(value.reshape(-1, value.shape[-1]) if self._spots is None else value[self._spots])

    def inputs(self, layer: Consumer, source: torch.Tensor, groups: int) -> torch.Tensor:
        """[groups, n, in * taps]: what the layer reads of ``source`` at each position."""
        if layer.windows is None:
            return self.of(source)[None]
        windows = layer.windows.over(source[None] if self.lone else source)
        rank = len(layer.windows.kernel)
        windows = windows.movedim(1, -rank - 1)  # [n, *positions, channels, *taps]
        x = windows if self._spots is None else windows[self._spots]
        return _float(x.reshape(self.count, groups, -1).movedim(1, 0))


class Direct:
    """A layer's output from the rows that it reads, without running it."""

    def __init__(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = matrix.flatten(2), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[groups, n, out] for ``x`` [groups, n, in * taps]; numbers are rounded as the layer rounds them."""
        found = x @ self._weight.to(x.dtype).mT
        if self._bias is not None:
            found = found + self._bias.to(x.dtype).reshape(found.shape[0], 1, found.shape[2])
        return found.to(self._weight.dtype).to(x.dtype)


def direct(gm: fx.GraphModule, node: fx.Node, layer: Consumer) -> Direct | None:
    """How a layer's output follows from its weight and bias; None where other values, or code of the user's, come into it."""
    module = layer.module
    stored = [n for n in node.all_input_nodes if n.name != layer.site.source]
    if any(n.op != "get_attr" for n in stored) or len(stored) != (0 if module is not None else 1 + (layer.bias is not None)):
        return None
    if module is not None and (type(module).forward not in _OWN or (module.bias is None) != (layer.bias is None)):
        return None
    matrix = layer.matrix(layer.current(gm).detach())
    bias = None if layer.bias is None else gm.get_parameter(layer.bias).detach()
    if bias is not None and bias.shape != (matrix.shape[0] * matrix.shape[1],):
        return None
    return Direct(matrix, bias)


def _float(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def channel_dim(layer: Consumer, output: torch.Tensor) -> int:
    """The dimension of a layer's output that its channels have."""
    if layer.windows is None:
        return layer.channel % output.dim()
    return output.dim() - len(layer.windows.kernel) - 1


def why_not(gm: fx.GraphModule, call: Consumer, readers: Mapping[int, Sequence[str]]) -> str | None:
    """Why the weight of a layer cannot be refitted."""
    if call.weight is None:
        return "its weight is computed from others"
    parameter = gm.get_parameter(call.weight)
    if not parameter.is_floating_point():
        return "its weight does not hold floating point numbers"
    if parameter.dim() > 2 and call.windows is None:
        return "an option of the convolution is computed"
    own = readers[id(parameter)]
    return None if own == [call.node] else f"its weight is read by several calls: {', '.join(own[:4])}"
