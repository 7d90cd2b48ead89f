"""Criteria: the protocol, the data that a criterion may read, their names, and the checks of every score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from torch import fx

from stp_fx.analysis.groups import Group
from stp_fx.analysis.sites import SiteMember, find_sites
from stp_fx.checks import shown
from stp_fx.errors import CriterionError, InputError, translated
from stp_fx.measure.gradients import Gradients
from stp_fx.measure.statistics import Statistics
from stp_fx.registry import Registry

__all__ = [
    "NEEDS",
    "Criterion",
    "ScoreContext",
    "as_criterion",
    "known_classes",
    "known_criteria",
    "needs_of",
    "part",
    "register",
    "resolve",
    "score_groups",
]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreContext:
    """Everything a criterion may read beside the group; it changes none of it.

    ``tensors`` holds parameters and buffers by name, ``seed`` feeds random criteria. ``module`` is the graph that the
    groups came from; ``statistics`` and ``gradients`` are those that were collected on it, or None. ``dims`` names the
    dimensions of each tensor that the scored groups touch, so that one read of a weight can serve them all, ``groups`` are
    these groups; :func:`score_groups` fills both in. ``cache`` is kept as long as the context: make a new context after the
    tensors changed. ``notes`` is what criteria had to say, for the report.
    """

    tensors: Mapping[str, torch.Tensor]
    seed: int = 0
    module: fx.GraphModule | None = None
    statistics: Statistics | None = None
    gradients: Gradients | None = None
    dims: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict, repr=False)
    groups: tuple[Group, ...] = dataclasses.field(default=(), repr=False)
    cache: dict[Hashable, Any] = dataclasses.field(default_factory=dict, repr=False)
    notes: list[str] = dataclasses.field(default_factory=list, repr=False)

    def note(self, text: str) -> None:
        """Leaves a line for the report; the same line again changes nothing."""
        if text not in self.notes:
            self.notes.append(text)

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter or buffer ``name``, of complex numbers their moduli; raises :class:`CriterionError` if there is none."""
        try:
            found = self.tensors[name]
            return self.cached(("modulus", name), found.detach().abs) if found.is_complex() else found
        except KeyError:
            raise CriterionError(
                f"no tensor {name!r} in the score context, which holds {len(self.tensors)} tensors; "
                "pass the parameters and buffers of the graph that the groups came from"
            ) from None

    def graph_module(self) -> fx.GraphModule:
        """The graph that the groups came from; raises :class:`CriterionError` without one."""
        if self.module is None:
            raise CriterionError("this criterion reads the graph, and the score context holds none: give `module`")
        return self.module

    def site_members(self, group: Group) -> tuple[SiteMember, ...]:
        """Where the units of ``group`` are read; raises :class:`CriterionError` if nothing was measured there."""
        if self.statistics is None:
            raise CriterionError(
                f"group {group.name!r} cannot be scored: this criterion reads activation statistics, and none were "
                "collected; give `calibration`, or run CollectStatistics before ScoreUnits"
            )
        members = find_sites(self.graph_module()).of(group)
        if not members:
            raise CriterionError(
                f"no contraction reads the units of group {group.name!r}, so there are no statistics of them; "
                "put it in `ignore`, or use a criterion that reads weights"
            )
        return members

    def cached(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value under ``key``, computed on first use."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]


@runtime_checkable
class Criterion(Protocol):
    """Scores the units of one group: a floating tensor of shape [units], higher is more important.

    Write it as a frozen dataclass with this ``__call__``; a plain function ``(group, context) -> scores`` works as
    well. An attribute ``needs``, a tuple of names in :data:`NEEDS`, lists the data that it reads beside weights; a
    criterion without one gets statistics of the activation inputs where calibration data is given.
    """

    def __call__(self, group: Group, context: ScoreContext, /) -> torch.Tensor: ...


NEEDS = ("statistics", "covariance", "gradients", "fisher", "hessian")
"""The data that a criterion may need: statistics of activation inputs, those with full second moments, the mean gradient
of every parameter, the mean of the squared per-sample gradients, the diagonal of the Hessian."""


def needs_of(criterion: object) -> tuple[str, ...]:
    """The ``needs`` of ``criterion``; raises :class:`InputError` for a name that is not in :data:`NEEDS`."""
    needs = tuple(getattr(criterion, "needs", ()))
    for need in needs:
        if need not in NEEDS:
            raise InputError(f"{criterion!r} needs {need!r}, which is not one of {', '.join(NEEDS)}")
    return needs


_CRITERIA: Registry[Callable[[], Criterion]] = Registry("criterion")
_HINT = "A callable (group, context) -> scores works as well"
_PARTS: Registry[type] = Registry("part of a criterion")
F = TypeVar("F", bound=Callable[..., Any])


def register(name: str) -> Callable[[F], F]:
    """Lets ``name`` stand for what the decorated class or function gives when called without arguments.

    Raises:
        InputError: another module has registered the name.
    """

    def add(factory: F) -> F:
        _CRITERIA.add(name, factory, owner=factory.__module__)
        return factory

    return add


def part(cls: type[T]) -> type[T]:
    """Lets a textual pipeline write an argument of a criterion, such as a cost model, as ``Macs()``."""
    _PARTS.add(cls.__name__, cls, owner=cls.__module__)
    return cls


def known_criteria() -> tuple[str, ...]:
    """Names that :func:`resolve` knows, sorted."""
    return _CRITERIA.names()


def known_classes() -> dict[str, Callable[..., Any]]:
    """Registered criteria and their parts, by the name of the class or function."""
    made = {factory.__name__: factory for factory in _CRITERIA.items().values()}
    return {**made, **{str(name): cls for name, cls in _PARTS.items().items()}}


def as_criterion(candidate: object) -> Criterion:
    """``candidate`` itself if it can be called as a criterion; classes and non-callables raise :class:`InputError`."""
    if isinstance(candidate, type):
        raise InputError(f"criterion {candidate.__name__} is a class; pass an instance of it: {candidate.__name__}()")
    if not callable(candidate):
        raise InputError(
            f"a criterion is a name ({', '.join(known_criteria())}) or a callable (group, context) -> scores; "
            f"got {type(candidate).__name__}: {shown(candidate)}"
        )
    return cast(Criterion, candidate)


def resolve(criterion: str | Criterion | Callable[[Group, ScoreContext], torch.Tensor]) -> Criterion:
    """The criterion of that name, or the given one.

    >>> resolve("magnitude")
    Magnitude(p=2.0, reduction='mean', normalizer='none')
    """
    if not isinstance(criterion, str):
        return as_criterion(criterion)
    return _CRITERIA.get(criterion, _HINT)()


def score_groups(groups: Sequence[Group], criterion: Criterion, context: ScoreContext) -> list[torch.Tensor]:
    """Scores of every group: one float64 CPU tensor of shape [units] each, finite, in the order of ``groups``.

    Raises :class:`CriterionError` if a weight is not floating point or holds no data, or if scores are not finite or
    not of shape [units]; the message names the group and the tensor.
    """
    dims: dict[str, set[int]] = {}
    for group in groups:
        for member in group.members:
            dims.setdefault(member.axis.tensor, set()).add(member.axis.dim)
        _check_weights(group, context, holding=getattr(criterion, "reads_weights", True))
    in_use = {name: tuple(sorted(found)) for name, found in dims.items()}
    context = dataclasses.replace(context, dims=in_use, groups=tuple(groups))
    return [_checked(_called(criterion, group, context), group, criterion, context) for group in groups]


def _called(criterion: Criterion, group: Group, context: ScoreContext) -> object:
    def failed(said: str) -> str:
        return (
            f"{shown(criterion)} failed on group {group.name!r} with {said}; a criterion is a callable (group, context) -> scores"
        )

    with translated(CriterionError, failed):
        return criterion(group, context)


def _check_weights(group: Group, context: ScoreContext, *, holding: bool) -> None:
    """``holding``: the criterion needs their numbers."""
    for member in group.members:
        axis = member.axis
        if axis.role not in ("weight", "scale"):
            continue
        tensor = context.tensor(axis.tensor)
        if not tensor.is_floating_point():
            raise CriterionError(
                f"{axis.tensor!r} (group {group.name!r}) has dtype {tensor.dtype}; only floating-point "
                "weights can be scored: prune before quantizing, or put it in `ignore`"
            )
        if holding and tensor.is_meta:
            raise CriterionError(
                f"{axis.tensor!r} (group {group.name!r}) is on the meta device and holds no numbers; load the weights first, "
                "or score without them (criterion 'random')"
            )


def _checked(scores: object, group: Group, criterion: Criterion, context: ScoreContext) -> torch.Tensor:
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point() or tuple(scores.shape) != (group.size,):
        found = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise CriterionError(
            f"{criterion!r} must give a floating-point tensor of shape ({group.size},) for group "
            f"{group.name!r}, one score a unit; it gave {found}"
        )
    result = scores.detach().to("cpu", torch.float64)
    finite = np.isfinite(result.numpy())
    if not finite.all():
        bad = group.size - int(finite.sum())
        raise CriterionError(
            f"{criterion!r} gave {bad} of {group.size} scores of group {group.name!r} as NaN or infinite; "
            + _blame(group, context)
        )
    return result


def _blame(group: Group, context: ScoreContext) -> str:
    names = dict.fromkeys(member.axis.tensor for member in group.members if member.axis.role != "buffer")
    tensors = {name: context.tensors[name] for name in names if name in context.tensors}
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        return f"not finite: {', '.join(map(repr, bad))}; repair these weights, or put them in `ignore`"
    return f"its weights ({', '.join(map(repr, tensors))}) are finite, so the criterion itself overflowed"
