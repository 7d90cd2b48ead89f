"""Textual pipelines: passes as calls with literal arguments, written and read without running anything."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

from stp_fx.checks import is_a
from stp_fx.criteria import base as criteria
from stp_fx.errors import InputError, StpFxError
from stp_fx.passes.base import GraphPass, known_passes

__all__ = ["parse_pipeline"]

_LONGEST = 20_000
"""Characters; a text of passes is short, and Python's own parser uses memory for every bracket."""


def parse_pipeline(text: str, arguments: Mapping[str, Any]) -> list[GraphPass]:
    """The passes of a text such as ``"ScoreUnits('variance'), SelectUnits(0.5)"``, with or without ``Pipeline(...)`` around it.

    Raises:
        InputError: an unknown pass, an argument that the pass does not take, or text that is not a pipeline.
    """
    if not is_a(text, str):
        raise InputError(f"a pipeline is read from text; got a {type(text).__name__}")
    if len(text) > _LONGEST:
        raise InputError(f"a pipeline of {len(text):,} characters is not read; the longest has {_LONGEST:,}")
    try:
        tree = ast.parse(f"({text.strip()},)" if text.strip() else "()", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{text!r} is not a pipeline: {error}; write ScoreUnits('magnitude'), SelectUnits(0.5)") from None
    items = list(tree.elts) if isinstance(tree, ast.Tuple) else [tree]
    if len(items) == 1 and _called(items[0]) == "Pipeline":
        items = _arguments(items[0])
    used: set[str] = set()
    passes = [_pass(item, arguments, used) for item in items]
    unused = [name for name in arguments if name not in used]
    if unused:
        raise InputError(f"no pass of {text!r} takes {unused[0]!r}")
    return passes


def _pass(node: ast.expr, arguments: Mapping[str, Any], used: set[str]) -> GraphPass:
    name, known = _called(node), known_passes()
    if name == "Pipeline":
        inner = [_pass(item, arguments, used) for item in _arguments(node)]
        return known["Pipeline"](*inner)
    if name not in known:
        raise InputError(f"{_source(node)} is not a pass; known: {', '.join(sorted(known))}")
    cls = known[name]
    given = {f.name for f in dataclasses.fields(cls) if f.init} & set(arguments)
    used.update(given)
    return _made(node, cls, {name: arguments[name] for name in given})


def _made(node: ast.expr, cls: Any, extra: Mapping[str, Any]) -> Any:
    assert isinstance(node, ast.Call)
    values = [_value(argument) for argument in node.args]
    named = {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    if len(named) < len(node.keywords):
        raise InputError(f"{_source(node)}: ** is not read in a pipeline; write the arguments out")
    try:
        return cls(*values, **{**extra, **named})
    except StpFxError:
        raise
    except TypeError as error:
        raise InputError(f"{_source(node)}: {str(error).replace('__init__() ', '')}") from None


def _value(node: ast.expr) -> Any:
    """A literal, a criterion with its arguments, or lists and mappings of these."""
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(map(_value, node.elts)) if isinstance(node, ast.Tuple) else list(map(_value, node.elts))
    name = _called(node)
    if name:
        known = criteria.known_classes()
        if name not in known:
            raise InputError(f"{_source(node)} is not a criterion or cost; known: {', '.join(sorted(known))}")
        return _made(node, known[name], {})
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise InputError(
            f"{_source(node)} is not a literal: a pipeline's text holds numbers, strings, lists and criteria"
        ) from None


def _called(node: ast.expr) -> str:
    """The name that a call calls, or ""."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _arguments(node: ast.expr) -> list[ast.expr]:
    return node.args if isinstance(node, ast.Call) else []


def _source(node: ast.expr) -> str:
    return repr(ast.unparse(node)[:80])
