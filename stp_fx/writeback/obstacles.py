"""Saying why a forward cannot express what is left: where it failed, and which constants are in the way."""

from __future__ import annotations

import ast
import dataclasses
import linecache
import textwrap
import traceback
from collections.abc import Sequence
from types import TracebackType

from torch import nn

from stp_fx.writeback.reads import Holder
from stp_fx.writeback.sizes import KINDS, Sizes

__all__ = ["Failure", "Seen", "failure_of", "message_of"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """An attribute that the forward reads and whose old value is the length of an axis that got shorter."""

    holder: Holder
    name: str
    old: tuple[int, ...]
    tried: tuple[int, ...]

    def __str__(self) -> str:
        old, new = (v[0] if len(v) == 1 else v for v in (self.old, self.tried))
        return f"{self.holder.label(self.name)} = {old} (tried {new})"


@dataclasses.dataclass(frozen=True)
class Failure:
    """An attempt that did not succeed: ``text`` says how; ``module`` (a path) and ``code`` where, if that is known."""

    text: str
    module: str | None = None
    code: str = ""
    place: str = ""
    constants: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text


def failure_of(error: Exception, model: nn.Module) -> Failure:
    """Where in the model's own code an error comes from."""
    names = {id(module): name for name, module in model.named_modules()}
    module, code, place = None, "", ""
    trail: TracebackType | None = error.__traceback__
    while trail is not None:
        frame = trail.tb_frame
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            module = names[id(owner)]
        own = not str(frame.f_globals.get("__name__", "")).startswith(("torch.", "stp_fx."))
        if own and module is not None:
            code, place = _statement(trail), f"{frame.f_code.co_filename}:{trail.tb_lineno}"
        trail = trail.tb_next
    said = str(error).strip().splitlines()
    return Failure(f"{type(error).__name__}: {said[0] if said else ''}", module, code, place)


def _statement(trail: TracebackType) -> str:
    summary = traceback.extract_tb(trail, limit=1)[0]
    first = summary.lineno or 0
    last = getattr(summary, "end_lineno", None) or _end_of_statement(summary.filename, first)
    lines = [linecache.getline(summary.filename, number) for number in range(first, last + 1)]
    return textwrap.dedent("".join(lines)).strip()


def _end_of_statement(filename: str, line: int) -> int:
    """The last line of the statement in ``line``. (From Python 3.11 on, a traceback tells that of the expression.)"""
    try:
        parsed = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:  # the file is not what it was when it was imported
        return line
    around = [n for n in ast.walk(parsed) if isinstance(n, ast.stmt) and n.lineno <= line <= (n.end_lineno or 0)]
    innermost = max(around, key=lambda n: n.lineno, default=None)
    return line if innermost is None or hasattr(innermost, "body") else innermost.end_lineno or line


def message_of(failure: Failure | None, model: nn.Module, seen: Sequence[Seen], sizes: Sizes) -> tuple[str, tuple[str, ...]]:
    """The text of a refusal, and the constants in the way: numbers in the failing code, then attributes around it."""
    constants = [] if failure is None else [*failure.constants, *_literals(failure, sizes)]
    module = None if failure is None else failure.module
    near = [s for s in seen if module is not None and _speaks_of(s.holder, module)]
    constants += map(str, near if module is not None and (near or constants) else seen)
    constants = list(dict.fromkeys(constants))[:12]
    listed = (
        "; ".join(constants) or "none that an attribute holds: a number is computed from a size, or held where it is not seen"
    )
    text = (
        f"{type(model).__name__} cannot express what is left of it. {_told(failure, model)}Constants in the way: {listed}. "
        "Prune so that they can stay (`uniform=True` keeps halves and layers alike and takes whole heads, `ignore` leaves a "
        "layer whole), or go on with the GraphModule"
    )
    return text, tuple(constants)


def _told(failure: Failure | None, model: nn.Module) -> str:
    if failure is None:
        return ""
    if failure.module is None:
        return f"{failure.text}. "
    owner = type(model.get_submodule(failure.module)).__name__
    where = f"'{failure.module}' ({owner})" if failure.module else owner
    return f"{failure.text}, in {where}" + (f", {failure.place}: `{' '.join(failure.code.split())}`. " if failure.code else ". ")


def _speaks_of(holder: Holder, module: str) -> bool:
    if isinstance(holder.thing, nn.Module):
        return holder.path == module
    return any(not place or module == place or module.startswith(f"{place}.") for place in holder.places)


def _literals(failure: Failure, sizes: Sizes) -> list[str]:
    """Numbers written in the failing statement that describe an axis which is shorter now."""
    try:
        tree = ast.parse(failure.code)
    except SyntaxError:
        return []
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is int]
    numbers: list[int] = [n.value for n in sorted(found, key=lambda n: (n.lineno, n.col_offset))]  # pyright: ignore
    places = (failure.module or "",)
    result = {}
    for start in range(len(numbers)):
        for stop in range(start + 1, min(start + 4, len(numbers)) + 1):
            new = sizes.split_by(tuple(numbers[start:stop]), places) or ()
            result |= {old: now for old, now in zip(numbers[start:stop], new) if old != now}
    for number in numbers:
        became = [] if result else [v for kind in KINDS for v in sizes.what_became(number, places).get(kind, []) if v != number]
        result |= {number: became[0]} if became else {}
    line = " ".join(failure.code.split())
    return [f"the number {old} in `{line}` ({new} is needed)" for old, new in result.items()]
