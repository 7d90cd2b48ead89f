"""Entries: one place for what is known of an op, and the tables that are derived from them.

An entry is written with :func:`rule`, as a pattern where a factor mapping says it all, else as a function::

    rule(aten.mm.default, pattern="m k, k n -> m n", roles={...}, calls=[...], samples=...)

    @rule(aten.flip.default, calls=[...], samples=...)
    def _flip(call): ...
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch

from stp_fx.errors import InputError
from stp_fx.ir import meta_run
from stp_fx.registry import Registry
from stp_fx.rules.call import OpCall
from stp_fx.rules.literals import PythonCalls, reach
from stp_fx.rules.mapping import FactorMapping, Role
from stp_fx.rules.samples import Sample

__all__ = ["RULES", "Entry", "Rule", "entries", "entry_of", "overload_of", "overloads", "registered", "rule", "rule_for"]

Rule = Callable[[OpCall], None]
R = TypeVar("R", bound=Rule)


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """The facts about some overloads of one op.

    ``rule`` states the factors of the results; a :class:`FactorMapping` is one. ``calls`` are the Python calls that reach the
    op, with what a shorter axis changes in them. ``samples`` are calls by label, for the golden lines and the check against
    numbers; ``unchecked`` says why the latter cannot be made. ``keeps_zero`` holds where a position whose operands all are
    zero gives zero.
    """

    ops: tuple[str, ...]
    rule: Rule
    calls: tuple[PythonCalls, ...] = ()
    samples: Mapping[str, Sample] = dataclasses.field(default_factory=dict)
    unchecked: str = ""
    keeps_zero: bool = False


RULES: Registry[Entry] = Registry("op rule", "an op has one rule: change that one, or register under a custom op of your own")
"""Entries by overload name (``"aten.mm.default"``)."""


@overload
def rule(
    *ops: Any,
    pattern: None = None,
    calls: Sequence[PythonCalls] = (),
    samples: Sample | Mapping[str, Sample] | None = None,
    unchecked: str = "",
    keeps_zero: bool = False,
    shape: Callable[..., Any] | None = None,
) -> Callable[[R], R]: ...


@overload
def rule(
    *ops: Any,
    pattern: str | FactorMapping,
    roles: Mapping[int, Role] | None = None,
    sizes: Mapping[str, str | Callable[[OpCall], int]] | None = None,
    cost: int | Callable[[OpCall], int] = 1,
    products: tuple[str, ...] | None = None,
    inexact: Mapping[str, str] | None = None,
    pins: Mapping[str, str] | None = None,
    distance: bool = False,
    calls: Sequence[PythonCalls] = (),
    samples: Sample | Mapping[str, Sample] | None = None,
    unchecked: str = "",
    keeps_zero: bool = False,
    shape: Callable[..., Any] | None = None,
) -> Entry: ...


def rule(
    *ops: Any,
    pattern: str | FactorMapping | None = None,
    calls: Sequence[PythonCalls] = (),
    samples: Sample | Mapping[str, Sample] | None = None,
    unchecked: str = "",
    keeps_zero: bool = False,
    shape: Callable[..., Any] | None = None,
    **mapping: Any,
) -> Any:
    """Registers the rule of op overloads (``torch.ops.aten.mm.default``, or a name such as ``"mylib.scan.default"``).

    With ``pattern`` the rule is a factor mapping, and the other fields of :class:`FactorMapping` may be given. Without, it
    decorates a function that takes an :class:`OpCall`. ``calls``, ``samples`` and the rest are those of :class:`Entry`;
    ``shape`` works out the results on meta tensors where torch is slow at it.

    >>> aten = torch.ops.aten
    >>> rule_for(aten.mm.default).pattern
    'm k, k n -> m n'

    Raises:
        InputError: an op that does not exist, a pattern that its schema does not fit, or an op that another module has
            given a rule.
    """
    funcs = [overload_of(op) for op in ops]
    labelled = {} if samples is None else {"": samples} if callable(samples) else dict(samples)

    def register(function: Rule, owner: str) -> Entry:
        entry = Entry(tuple(map(str, funcs)), function, tuple(calls), labelled, unchecked, keeps_zero)
        for func in funcs:
            RULES.add(str(func), entry, owner=owner)
            if shape is not None:
                meta_run.shortcut(func, shape)
        for each in calls:
            reach(each, owner)
        return entry

    if pattern is None:
        if mapping:
            raise InputError(f"rule of {', '.join(map(str, funcs))}: {', '.join(mapping)} belong to a pattern; give pattern=...")

        def decorate(function: Any) -> Any:
            register(function, getattr(function, "__module__", "?"))
            return function

        return decorate
    given = {name: value for name, value in mapping.items() if value is not None}
    factor_mapping = pattern if isinstance(pattern, FactorMapping) else FactorMapping(pattern, **given)
    for func in funcs:
        factor_mapping.check(func)
    return register(factor_mapping, str(sys._getframe(1).f_globals.get("__name__", "?")))


def rule_for(func: Any) -> Any:
    """The rule of an op overload, or ``None``."""
    entry = entry_of(func)
    return None if entry is None else entry.rule


def entry_of(func: Any) -> Entry | None:
    """The entry of an op overload, or ``None``."""
    return RULES.find(str(func))


def load_for_imported() -> None:
    """Enters the ops of libraries that this process has imported; a graph has none of others."""
    if "torchvision.ops" in sys.modules:
        importlib.import_module("stp_fx.rules.ops.detection")


def registered() -> Mapping[str, Rule]:
    """All rules by overload name (a copy)."""
    return {str(name): entry.rule for name, entry in RULES.items().items()}


def entries() -> tuple[Entry, ...]:
    """All entries, in the order in which they were registered."""
    return tuple(dict.fromkeys(RULES.items().values()))


def overload_of(op: Any) -> Any:
    """The overload under a name (``"aten.mm.default"``); an overload is handed back.

    Raises:
        InputError: no such op or overload; names close ones.
    """
    if isinstance(op, torch._ops.OpOverload):
        return op
    if not isinstance(op, str):
        raise InputError(f"no op overload: {op!r}; give torch.ops.namespace.op.overload, or its name 'namespace.op.overload'")
    found = _find(op)
    if found is not None:
        return found
    parts = op.split(".")
    known = sorted(name.replace("::", ".") for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{parts[0]}::"))
    known = [name if name.count(".") > 1 else f"{name}.default" for name in known]
    close = difflib.get_close_matches(op, known, n=3, cutoff=0.6)
    near = "" if known else f"; torch knows no op of the namespace '{parts[0]}'"
    if close:
        near = f"; close names: {', '.join(close)}"
    raise InputError(f"no op '{op}'{near}. Write 'namespace.op.overload', and define a custom op before its rule")


def _find(name: str) -> Any:
    parts = name.split(".")
    if len(parts) != 3:
        return None
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    return None if packet is None else getattr(packet, parts[2], None)


def overloads(*names: str) -> tuple[Any, ...]:
    """Those of the named overloads that this version of torch has: for ops that come and go between versions.

    >>> [str(op) for op in overloads("aten.mm.default", "aten.of_another_version.default")]
    ['aten.mm.default']
    """
    return tuple(found for name in names if (found := _find(name)) is not None)
