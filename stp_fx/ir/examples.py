"""An example with real data, and the same in another batch or size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from stp_fx.ir.nested import leaves_of, mapped

__all__ = ["Example", "example_of_call", "filled", "other_sizes", "real_example", "with_rows"]

_LARGEST = 1 << 28
"""Elements of an example that is run."""


@dataclasses.dataclass(frozen=True)
class Example:
    """The arguments that a model is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def mapped(self, function: Any) -> Example:
        """Its tensors replaced; a tensor that is given twice stays one tensor."""
        made: dict[int, torch.Tensor] = {}

        def once(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in made:
                made[id(tensor)] = function(tensor)
            return made[id(tensor)]

        return Example(*mapped(torch.Tensor, once, (self.args, dict(self.kwargs))))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return leaves_of(torch.Tensor, (self.args, dict(self.kwargs)))


def example_of_call(args: Any, kwargs: Mapping[str, Any]) -> Example:
    """The `example_inputs` and `kwargs` of a user."""
    return Example(() if args is None else tuple(args) if isinstance(args, (tuple, list)) else (args,), kwargs)


def real_example(model: nn.Module, given: Example) -> Example | str:
    """The user's tensors where they hold data; random numbers, zeros for integers, where they are on the meta device, not finite
    or mere placeholders (``torch.zeros(1, 3, 224, 224)``). Or why there is none."""
    stored = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in stored):
        return "the model is on the meta device"
    device = stored[0].device if stored else torch.device("cpu")
    if sum(t.numel() for t in given.tensors) > _LARGEST:
        return "the example is too large"
    draws = torch.Generator().manual_seed(0)

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta or _says_nothing(tensor, len(given.tensors)):
            return filled(tensor, device if tensor.is_meta else tensor.device, draws)
        return tensor.detach()

    found = given.mapped(real)
    return found if {t.device for t in found.tensors} == {device} else found.mapped(lambda t: t.to(device))


def filled(tensor: torch.Tensor, device: torch.device, draws: torch.Generator) -> torch.Tensor:
    """Random numbers of the tensor's shape and dtype; zeros for integers, which may be indices."""
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.randn(tensor.shape, generator=draws, dtype=torch.cfloat if tensor.is_complex() else None).to(
            device, tensor.dtype
        )
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)


def _says_nothing(tensor: torch.Tensor, number: int) -> bool:
    """Whether numbers drawn at random check more than these do."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.layout is not torch.strided:
        return False
    if not bool(tensor.isfinite().all()):
        return True
    constant = tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all())
    return constant and (tensor.dim() >= 3 or number == 1)


def with_rows(example: Example, rows: int) -> Example:
    """The example with another batch: its rows in turn, floating ones rolled so that no two are alike."""

    def resized(tensor: torch.Tensor) -> torch.Tensor:
        taken = tensor.index_select(0, torch.arange(rows, device=tensor.device) % len(tensor))
        if not taken.is_floating_point() or taken.dim() < 2:
            return taken
        return torch.stack([row.roll(3 * k + 1, -1) for k, row in enumerate(taken)])

    return example.mapped(resized)


def other_sizes(example: Example) -> Iterator[tuple[str, Example]]:
    """The example in other image sizes or sequence lengths, by name; most likely ones first."""
    images = [t for t in example.tensors if t.dim() >= 4 and t.is_floating_point()]
    if images:
        height, width = (int(size) for size in images[0].shape[-2:])
        tall, wide = _resized(height), _resized(width)
        yield (
            f"size {tall}x{wide}",
            example.mapped(
                lambda t: _cut(_cut(t, -2, tall), -1, wide) if t.dim() >= 4 and t.shape[-2:] == (height, width) else t
            ),
        )
        return
    for dim in (1, 2):
        longest = max((int(t.shape[dim]) for t in example.tensors if _has_length(t, dim)), default=0)
        if longest > 2:
            length = longest - max(1, longest // 4)
            yield (
                f"length {length}",
                example.mapped(
                    lambda t, d=dim, n=length, m=longest: _cut(t, d, n) if _has_length(t, d) and t.shape[d] == m else t
                ),
            )


def _has_length(tensor: torch.Tensor, dim: int) -> bool:
    """Whether a dimension may be one of positions: the second of token ids and masks, one of two of [batch, time, features]."""
    return tensor.dim() > dim and (tensor.dim() == 3 or (tensor.dim() == 2 and not tensor.is_floating_point()))


def _resized(size: int) -> int:
    """Another size that divides as the first does."""
    step = math.gcd(size, 32)
    step = max(1, size // 4) if step >= size else step
    return size - step if size >= 128 else size + step


def _cut(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    return tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
