"""``Selection``: all that decides which units are removed. One value, shared by every call that selects.

A new option is a field here, and a line of :class:`SelectionOptions`: ``prune_graph``, ``PATPassManager``, ``sweep``,
``prune_submodule``, ``SelectUnits`` and the command line take their options from these two.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, cast, get_args

from torch import nn

from stp_fx.analysis.names import entries_of
from stp_fx.checks import check_flag, is_a, is_choice, is_number, is_whole, shown
from stp_fx.errors import InputError

__all__ = [
    "Allocation",
    "DamageFunction",
    "Name",
    "ProductOption",
    "Scope",
    "Selection",
    "SelectionOptions",
    "SharedOptions",
    "Target",
    "default_of",
    "takes_selection",
]

Scope = Literal["local", "global", "isomorphic"]
Target = Literal["channels", "macs", "params", "latency", "memory"]
ProductOption = Literal["auto", "outer", "inner", "both", "none"]
AllocationName = Literal["scope", "optimal"]
DamageFunction: TypeAlias = Callable[[str, Sequence[float]], Sequence[float]]
"""``(group, fractions) -> damages``: what is lost when these fractions of a group's units are removed, those of the lowest scores
first. The damages of all groups are added up, so they are of one unit of measure."""
Allocation: TypeAlias = AllocationName | DamageFunction
Name: TypeAlias = str | nn.Module
"""A module, parameter, axis (``"conv1.weight:0"``) or group, by name, by glob (``"layer*.conv1"``), or a module itself."""

F = TypeVar("F", bound=Callable[..., Any])


class SharedOptions(TypedDict, total=False):
    """The fields of :class:`Selection` but for ``ratio`` and ``ratios``, as keyword arguments."""

    scope: Scope
    target: Target
    ignore: Name | Iterable[Name]
    round_to: int
    max_ratio: float
    products: ProductOption
    uniform: bool
    allocation: Allocation
    cache_tokens: int
    cache_batch: int


class SelectionOptions(SharedOptions, total=False):
    """The fields of :class:`Selection` but for ``ratio``, as keyword arguments."""

    ratios: Mapping[Name, float] | None


def _help(text: str, form: str = "") -> dict[str, str]:
    """The command line's help text of a field; ``form``: how several values are given there."""
    return {"help": text, "form": form}


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which units are removed.

    Args:
        ratio: the fraction of the target that is removed, in [0, 1).
        scope: "local" (each group loses its share), "global" (groups are compared) or "isomorphic" (groups of the same
            structure are compared, and each structure loses its share).
        target: what ``ratio`` counts: "channels", "macs", "params", "latency" (as :func:`stp_fx.passes.latency_model` predicts
            it from measurements on this machine) or "memory" (bytes of weights, of the activations that are alive at once, and
            with ``cache_tokens`` of keys and values: :func:`stp_fx.passes.memory_model`). Costs are met within one unit.
        ratios: a layer's own ratio, by name, glob or module. Whole experts are removed only here, by a name that stands for
            nothing else, as their router's (``{"layers.0.mlp.gate": 0.5}``); as many stay as are chosen for a token.
        ignore: parameters, axes, modules or groups, by name, glob or module: the channels that they touch are kept.
        round_to: every group keeps a multiple of this many units.
        max_ratio: no group loses a larger fraction of its units than this, in (0, 1].
        products: which factor of an axis like heads x head_dim is cut: "outer", "inner", "both", "none" or "auto".
        uniform: every group keeps the same fraction, so that layers that are alike stay alike, heads are removed whole ("auto" is
            "outer"), and widths stay multiples of what they were multiples of: what one number of a configuration can say. The
            fractions are those that divide all groups: twelfths, where 12 heads meet widths of 768 and 3072.
        allocation: how much of each group is removed. "scope": what ``scope`` says. "optimal": of the plans that meet the target,
            the one of least damage, by damage curves that :class:`stp_fx.passes.MeasureDamage` measures on the calibration data.
            Or a function ``(group, fractions) -> damages`` of your own, which is asked once a group, for rising fractions. Which
            units of a group are removed is up to their scores alone.
        cache_tokens: with the target "memory": the tokens whose keys and values a decoder keeps, of each generated sequence; they
            count beside weights and activations. 0: none.
        cache_batch: how many sequences are generated at once.

    Raises:
        InputError: a value that is out of range or of another type.

    >>> Selection(0.5, scope="global")
    Selection(0.5, scope='global')
    """

    ratio: float = field(default=0.5, metadata=_help("the fraction to remove, in [0, 1) (default: 0.5)"))
    scope: Scope = field(
        default="local",
        metadata=_help("local: every group loses its share (default); global: groups are compared; isomorphic: alike groups are"),
    )
    target: Target = field(
        default="channels",
        metadata=_help(
            "what a ratio counts: channels (default), macs, params, latency (predicted from measurements on this machine) or "
            "memory (weights and activations)"
        ),
    )
    ratios: Mapping[Name, float] | None = field(
        default_factory=dict[Name, float], metadata=_help("a layer's own ratio", "NAME=RATIO")
    )
    ignore: Name | Iterable[Name] = field(
        default=(), metadata=_help("a module, tensor or axis (conv1.weight:0) that is kept whole; globs work", "NAME")
    )
    round_to: int = field(default=1, metadata=_help("groups keep multiples of this many channels (8, 16)"))
    max_ratio: float = field(default=1.0, metadata=_help("no group loses a larger fraction than this"))
    products: ProductOption = field(
        default="auto",
        metadata=_help("of attention: outer removes whole heads, inner removes head dimensions (default: auto)"),
    )
    uniform: bool = field(
        default=False,
        metadata=_help("every group keeps the same fraction, and heads go whole, as a configuration can say"),
    )
    allocation: Allocation = field(
        default="scope",
        metadata=_help("how much of each group is removed: scope: as --scope says (default); optimal: by measured damage"),
    )
    cache_tokens: int = field(
        default=0,
        metadata=_help(
            "with --target memory: keys and values of this many tokens count, for each generated sequence (default: 0)"
        ),
    )
    cache_batch: int = field(
        default=1, metadata=_help("with --cache-tokens: how many sequences are generated at once (default: 1)")
    )

    def __post_init__(self) -> None:
        _check_ratio("`ratio`", self.ratio)
        for name, known in (("scope", Scope), ("target", Target), ("products", ProductOption)):
            _check_choice(name, getattr(self, name), get_args(known))
        ratios: Mapping[Name, float] = {} if self.ratios is None else self.ratios
        if not is_a(ratios, Mapping):
            raise InputError(f"`ratios` maps layers to ratios of their own, {{'conv1': 0.3}}; got {shown(ratios)}")
        for name, own in ratios.items():
            _check_name("ratios", name)
            _check_ratio(f"`ratios`: the ratio of {_named(name)}", own)
        object.__setattr__(self, "ratios", dict(ratios))
        object.__setattr__(self, "ignore", entries_of(self.ignore, "ignore"))
        if not is_number(self.max_ratio) or not 0 < self.max_ratio <= 1:
            raise InputError(f"`max_ratio` is the largest fraction of a group to remove, in (0, 1]; got {shown(self.max_ratio)}")
        if not is_whole(self.round_to) or self.round_to < 1:
            raise InputError(f"`round_to` is a whole number of units, at least 1; got {shown(self.round_to)}")
        check_flag("uniform", self.uniform)
        if self.uniform and self.scope != "local":
            raise InputError(f"uniform=True takes the same fraction of every group: scope={self.scope!r} does not go with it")
        self._check_allocation()
        self._check_cache()

    def _check_allocation(self) -> None:
        if not callable(self.allocation) and not is_choice(self.allocation, get_args(AllocationName)):
            raise InputError(
                f"`allocation` is {', '.join(map(repr, get_args(AllocationName)))} or a function (group, fractions) -> damages; "
                f"got {shown(self.allocation)}"
            )
        if self.allocation == "scope":
            return
        if self.scope != "local" or self.uniform:
            given = "uniform=True" if self.uniform else f"scope={self.scope!r}"
            raise InputError(
                f"`allocation` says by itself how much of each group is removed, and so does {given}: leave one of them out"
            )

    def _check_cache(self) -> None:
        if not is_whole(self.cache_tokens) or self.cache_tokens < 0:
            raise InputError(f"`cache_tokens` is a whole number of tokens, at least 0; got {shown(self.cache_tokens)}")
        if not is_whole(self.cache_batch) or self.cache_batch < 1:
            raise InputError(f"`cache_batch` is a whole number of sequences, at least 1; got {shown(self.cache_batch)}")
        if self.cache_tokens and self.target != "memory":
            raise InputError(f"`cache_tokens` counts memory: give target='memory' with it, or leave it out for {self.target!r}")
        if self.cache_batch != 1 and not self.cache_tokens:
            raise InputError("`cache_batch` is how many sequences keep `cache_tokens` tokens each: give that as well")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text()})"

    def text(self) -> str:
        """The ratio and what is not at its default, as arguments of a call."""
        changed = [
            f"{each.name}={_plain(getattr(self, each.name))}"
            for each in dataclasses.fields(Selection)[1:]
            if getattr(self, each.name) != default_of(each)
        ]
        return ", ".join([repr(self.ratio), *changed])


def takes_selection(*own: str) -> Callable[[F], F]:
    """Decorates a function that passes ``**options`` on to :class:`Selection`: its signature shows the fields, but for ``own``
    (those that it names itself, or does not take), and an option that is no field is an error that names the close ones."""

    def decorate(function: F) -> F:
        fields = [each for each in dataclasses.fields(Selection) if each.name not in own]
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        known = {each.name for each in fields}
        kind = inspect.Parameter.KEYWORD_ONLY
        shown = [inspect.Parameter(f.name, kind, default=default_of(f), annotation=f.type) for f in fields]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            names = [name for name in kwargs if name not in known and name not in signature.parameters]
            if names:
                raise InputError(
                    f"{function.__qualname__.removesuffix('.__init__')} has no argument {names[0]!r}; "
                    f"of the selection it takes {', '.join(f.name for f in fields)}"
                )
            return function(*args, **kwargs)

        shown_as: Any = call
        shown_as.__signature__ = signature.replace(parameters=[*kept, *shown])
        return shown_as

    return decorate


def _check_name(argument: str, name: object) -> None:
    if not isinstance(name, (str, nn.Module)):
        raise InputError(f"`{argument}` holds {shown(name)}: give names of parameters or modules, globs, or modules")


def _check_ratio(what: str, value: object) -> None:
    if not is_number(value) or not 0 <= value < 1:
        raise InputError(f"{what} is the fraction to remove, in [0, 1); got {shown(value)}")


def _check_choice(what: str, value: object, known: Collection[str]) -> None:
    if not is_choice(value, known):
        raise InputError(f"unknown {what} {shown(value)}; known: {', '.join(known)}")


def default_of(option: dataclasses.Field[Any]) -> Any:
    """The value of a field that is not given."""
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _named(name: Name) -> str:
    return repr(name) if isinstance(name, str) else f"a {type(name).__name__}"


def _plain(value: object) -> str:
    """A value as text; modules, which have no short one, by their class."""
    if isinstance(value, nn.Module):
        return f"<{type(value).__name__}>"
    if isinstance(value, tuple):
        parts = [_plain(each) for each in cast("tuple[object, ...]", value)]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_plain(k)}: {v!r}" for k, v in cast("Mapping[object, object]", value).items()) + "}"
    return repr(value)
