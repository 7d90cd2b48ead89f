"""Derivatives of a loss for every parameter: mean gradients, squared per-sample gradients, the diagonal of the Hessian."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from stp_fx.errors import InputError, translated
from stp_fx.ir.stamp import Stamp, stamp_of
from stp_fx.measure.calibration import arguments_of, batches, eval_twin
from stp_fx.measure.distributed import several_processes, summed

__all__ = ["Gradients", "call_loss", "collect_gradients", "cross_entropy"]

Loss = Callable[[fx.GraphModule, Any], torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Gradients:
    """By parameter name, each of the parameter's shape, float32 or wider, on its device.

    ``mean``: the gradient of the loss, averaged over batches. ``fisher``: the squares of single samples' gradients,
    averaged (the diagonal of the empirical Fisher matrix). ``hessian``: Hutchinson's estimate of the Hessian's diagonal.
    A parameter that is frozen, or that the loss does not reach, is in none. ``stamp``: of the graph and weights measured.
    """

    mean: Mapping[str, torch.Tensor]
    fisher: Mapping[str, torch.Tensor] | None = None
    hessian: Mapping[str, torch.Tensor] | None = None
    stamp: Stamp | None = dataclasses.field(default=None, repr=False)

    def __repr__(self) -> str:
        kinds = [name for name in ("fisher", "hessian") if getattr(self, name) is not None]
        return f"Gradients({len(self.mean)} parameters{' with ' + ' and '.join(kinds) if kinds else ''})"


def cross_entropy(gm: fx.GraphModule, batch: Any) -> torch.Tensor:
    """The default loss: cross-entropy on batches of ``(input, target)``.

    Raises:
        InputError: a batch without a target, or an output that is not one tensor.
    """
    arguments = arguments_of(gm, batch)
    if not isinstance(batch, (list, tuple)) or len(batch) <= len(arguments):
        raise InputError(
            "the default loss is cross-entropy and needs batches of (input, target); "
            "give `loss`, a function (gm, batch) -> scalar, for anything else"
        )
    output = gm(*arguments)
    if not isinstance(output, torch.Tensor):
        raise InputError(f"the default loss needs one tensor as output, the graph gives a {type(output).__name__}; give `loss`")
    return F.cross_entropy(output, batch[len(arguments)])


def collect_gradients(
    gm: fx.GraphModule,
    calibration: Iterable[Any] | torch.Tensor | None,
    loss: Loss | None = None,
    *,
    fisher: bool = False,
    hutchinson: int = 0,
    seed: int = 0,
) -> Gradients:
    """Runs the batches in eval mode; gradients that the parameters hold are not changed.

    ``hutchinson`` is the number of random sign vectors a batch for the Hessian's diagonal (Hutchinson 1990).

    Under ``torch.distributed`` every rank gives its own batches and gets the averages over all.

    Raises:
        InputError: no batch or one that does not fit, a loss that is not a finite scalar, no parameter that requires
            gradients.
    """
    names = [name for name, p in gm.named_parameters() if p.requires_grad]
    if not names:
        raise InputError("no parameter requires gradients, so a gradient criterion has nothing to read: unfreeze the model")
    parameters: list[torch.Tensor] = [gm.get_parameter(name) for name in names]
    function = cross_entropy if loss is None else loss
    sums = _Sums(parameters)
    squares, diagonal = _Sums(parameters), _Sums(parameters)
    signs = torch.Generator().manual_seed(seed)
    number = 0
    twin = eval_twin(gm)
    with torch.enable_grad():
        for number, batch in enumerate(batches(gm, calibration, "collecting gradients"), 1):
            if hutchinson:
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                    _hutchinson(twin, batch, function, parameters, sums, diagonal, hutchinson, signs, number - 1)
            else:
                sums.add(_gradients(_value(twin, batch, function, number - 1), parameters))
            if fisher:
                for sample in _samples(batch):
                    squares.add([None if g is None else g * g for g in
                                 _gradients(_value(twin, sample, function, number - 1), parameters)])  # fmt: skip
    if several_processes():
        for each in (sums, squares, diagonal):
            each.reduce()
    hessian = diagonal.means(names) if hutchinson else None
    return Gradients(sums.means(names), squares.means(names) if fisher else None, hessian, stamp_of(gm))


class _Sums:
    """Sums of one tensor a parameter; a parameter that was never reached has none."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._sums: list[torch.Tensor | None] = [None] * len(parameters)
        self._count = 0

    def add(self, values: Iterable[torch.Tensor | None]) -> None:
        self._count += 1
        for k, value in enumerate(values):
            if value is None:
                continue
            value = value.detach()
            wide = value if value.dtype == torch.float64 else value.float()
            known = self._sums[k]
            self._sums[k] = wide.clone() if known is None else known.add_(wide)

    def reduce(self) -> None:
        """Sums over all processes of the default group."""
        self._count = summed(self._count, [each for each in self._sums if each is not None])

    def means(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: total / self._count for name, total in zip(names, self._sums, strict=True) if total is not None}


_CALLED = "it is called with the model and a batch, as in loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"


def call_loss(loss: Loss, gm: fx.GraphModule, batch: Any, number: int) -> Any:
    """The value of the loss for a batch.

    Raises:
        InputError: it fails; names the batch.
    """
    with translated(InputError, lambda said: f"the loss fails on batch {number} with {said}; {_CALLED}"):
        return loss(gm, batch)


def _value(gm: fx.GraphModule, batch: Any, loss: Loss, number: int) -> torch.Tensor:
    value = call_loss(loss, gm, batch, number)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(f"the loss of calibration batch {number} is {found}; a loss is one scalar tensor (take its mean)")
    if not bool(torch.isfinite(value.detach()).all()):
        raise InputError(f"the loss of calibration batch {number} is {value.item()}; criteria need a finite one")
    if not value.requires_grad:
        raise InputError(f"the loss of calibration batch {number} does not depend on any parameter that requires gradients")
    return value.reshape(())


def _gradients(value: torch.Tensor, parameters: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    return torch.autograd.grad(value, parameters, allow_unused=True)


def _hutchinson(
    gm: fx.GraphModule,
    batch: Any,
    loss: Loss,
    parameters: list[torch.Tensor],
    sums: _Sums,
    diagonal: _Sums,
    draws: int,
    signs: torch.Generator,
    number: int,
) -> None:
    """E[z * Hz] over random signs z is the diagonal of H."""
    first = torch.autograd.grad(_value(gm, batch, loss, number), parameters, create_graph=True, allow_unused=True)
    sums.add(first)
    reached = [k for k, g in enumerate(first) if g is not None and g.requires_grad]
    for draw in range(draws):
        vectors = [(torch.randint(0, 2, parameters[k].shape, generator=signs) * 2 - 1).to(parameters[k]) for k in reached]
        products = torch.autograd.grad(
            [first[k] for k in reached],
            [parameters[k] for k in reached],
            vectors,
            retain_graph=draw + 1 < draws,
            allow_unused=True,
        )
        estimate: list[torch.Tensor | None] = [None if g is None else torch.zeros_like(g) for g in first]
        for k, vector, product in zip(reached, vectors, products, strict=True):
            if product is not None:
                estimate[k] = vector * product
        diagonal.add(estimate)


def _samples(batch: Any) -> Iterator[Any]:
    """The batch cut into batches of one."""
    size = next((t.shape[0] for t in _tensors(batch) if t.dim()), 0)
    for k in range(size):
        yield _cut(batch, k, size)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _cut(value: Any, k: int, size: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[k : k + 1] if value.dim() and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {key: _cut(each, k, size) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_cut(each, k, size) for each in value)
    return value
