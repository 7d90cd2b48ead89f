"""Calibration data: the batches of a DataLoader as arguments of a graph, on its device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import fx, nn

from stp_fx.errors import InputError, translated
from stp_fx.ir.inference_mode import normal_tensor
from stp_fx.ir.nested import holds
from stp_fx.ir.provenance import example_of
from stp_fx.progress import Progress, carrying, progress_of, steps

__all__ = ["arguments_of", "as_device", "batches", "device_of", "eval_twin", "limited", "reiterable", "watched"]

M = TypeVar("M", bound=nn.Module)


def batches(
    gm: fx.GraphModule, calibration: Iterable[Any] | torch.Tensor | None, what: str, *, show: bool = True
) -> Iterator[Any]:
    """The batches of ``calibration`` on the graph's device, each checked against the graph's inputs. If ``show``, progress is
    shown as ``calibration`` says (:mod:`stp_fx.progress`). A single tensor is one batch.

    Raises:
        InputError: nothing to iterate over, no batch at all, or a batch that does not fit the graph's inputs; names the batch.
    """
    if calibration is None:
        raise InputError(f"{what} needs calibration data: give `calibration`, an iterable of batches (a DataLoader)")
    calibration = reiterable(calibration)
    device = device_of(gm)
    number = -1
    with steps(what, _length(calibration), progress_of(calibration) if show else False) as done:
        for number, batch in enumerate(_read(calibration)):
            try:
                moved = as_device(batch, device)
            except RecursionError:
                raise InputError(f"batch {number} is nested too deeply, or holds itself: give tensors, tuples or dicts") from None
            _check(gm, moved, number)
            yield moved
            done()
    if number < 0:
        raise InputError(f"`calibration` has no batch, so {what} has nothing to read")


def _read(calibration: Iterable[Any]) -> Iterator[Any]:
    """The batches.

    Raises:
        InputError: the data fails as it is read; names the batch.
    """
    number = 0
    with translated(InputError, lambda said: f"`calibration` fails at batch {number} with {said}"):
        for batch in calibration:
            yield batch
            number += 1


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except Exception:  # a stream, or a loader of one
        return None


def arguments_of(gm: fx.GraphModule, batch: Any) -> tuple[Any, ...]:
    """A batch as the graph's arguments: a tensor, a tuple whose first entries they are, or a mapping by their names."""
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    known = example_of(gm)
    constants = {k: value for k, value in enumerate(known) if not holds(torch.Tensor, value)}
    if isinstance(batch, Mapping):
        return tuple(batch.get(name, constants.get(k)) for k, name in enumerate(names))
    values = list(batch) if isinstance(batch, (list, tuple)) else [batch]
    given = {k: value for k, value in constants.items() if k < len(values)}
    if all(type(values[k]) is type(value) and values[k] == value for k, value in given.items()):
        after = range(len(values), len(names))
        return (*values[: len(names)], *_filled((), constants, after))
    return tuple(_filled(values, constants, range(len(names))))


def _filled(values: Iterable[Any], constants: Mapping[int, Any], places: range) -> Iterator[Any]:
    """``values`` at the places that no constant has, until they are at their end."""
    given = iter(values)
    for place in places:
        try:
            yield constants[place] if place in constants else next(given)
        except StopIteration:
            return


def device_of(gm: nn.Module) -> torch.device:
    """Where the first parameter or buffer is."""
    return next((t.device for t in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))


def as_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return normal_tensor(batch.to(device, non_blocking=True))
    if isinstance(batch, Mapping):
        return {key: as_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return tuple(as_device(value, device) for value in batch)
    if isinstance(batch, (list, tuple)):
        return type(batch)(as_device(value, device) for value in batch)
    return batch


def eval_twin(gm: M) -> M:
    """The same network in eval mode: new module objects around the same parameters, buffers and hooks.

    ``gm`` keeps its train/eval flags, also while the twin runs, so two threads can measure one graph at once.
    """
    twins: dict[int, nn.Module] = {}

    def twin_of(module: nn.Module) -> nn.Module:
        known = twins.get(id(module))
        if known is None:
            known = twins[id(module)] = object.__new__(type(module))
            known.__dict__.update(module.__dict__)
            known.__dict__["_modules"] = {name: child and twin_of(child) for name, child in module._modules.items()}
            known.__dict__["_parameters"], known.__dict__["_buffers"] = dict(module._parameters), dict(module._buffers)
            known.training = False
        return known

    return twin_of(gm)  # type: ignore[return-value]


class _Replayed:
    """A one-shot iterator that can be iterated again: batches are kept as far as they have been read."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source, self._read = source, []

    def __iter__(self) -> Iterator[Any]:
        at = 0
        while True:
            if at == len(self._read):
                try:
                    self._read.append(next(self._source))
                except StopIteration:
                    return
            yield self._read[at]
            at += 1


class _Limited:
    """The first batches of data, at every iteration; a batch that is not used is not drawn."""

    def __init__(self, data: Iterable[Any], number: int) -> None:
        self._data, self._number = data, number

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._data), self._number)

    def __len__(self) -> int:
        return min(len(self._data), self._number)  # type: ignore[arg-type]


def reiterable(calibration: Any, argument: str = "calibration") -> Iterable[Any]:
    """``calibration`` as something that can be iterated more than once. A loader or a list is returned as it is; of a one-shot
    iterator the batches are kept as they are read, and no more than are read.

    Raises:
        InputError: not an iterable of batches.
    """
    if isinstance(calibration, torch.Tensor):
        return [calibration]
    if isinstance(calibration, (str, bytes, Mapping)) or not isinstance(calibration, Iterable):
        raise InputError(
            f"`{argument}` is a {type(calibration).__name__}; give an iterable of batches (a DataLoader, a list of tensors)"
        )
    return _Replayed(calibration) if isinstance(calibration, Iterator) else calibration


def watched(calibration: Any, progress: Progress, argument: str = "calibration") -> Any:
    """``calibration`` as :func:`reiterable` gives it, with the choice of ``progress`` for all that reads it; None for None.

    Raises:
        InputError: not an iterable of batches, or a ``progress`` that is neither None, True, False, nor a function.
    """
    return carrying(None if calibration is None else reiterable(calibration, argument), progress)


def limited(data: Iterable[Any], number: int | None) -> Iterable[Any]:
    """The first ``number`` batches of ``data`` at every iteration; all for None."""
    return data if number is None else _Limited(data, number)


def _check(gm: fx.GraphModule, batch: Any, number: int) -> None:
    expected = example_of(gm)
    found = arguments_of(gm, batch)
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    if len(found) < len(expected):
        raise InputError(
            f"calibration batch {number} has {len(found)} values; the graph takes {len(expected)}: {', '.join(names)}"
        )
    for name, value, example in zip(names, found, expected, strict=True):
        if not isinstance(example, torch.Tensor):
            continue
        if not isinstance(value, torch.Tensor):
            raise InputError(f"calibration batch {number}: {name!r} is a {type(value).__name__}; the graph takes a tensor")
        if value.dim() != example.dim() or value.is_floating_point() != example.is_floating_point():
            raise InputError(
                f"calibration batch {number}: {name!r} is {tuple(value.shape)} {value.dtype}; the graph was traced with "
                f"{tuple(example.shape)} {example.dtype}"
            )
