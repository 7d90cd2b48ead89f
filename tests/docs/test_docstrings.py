"""Every public name has a docstring: functions and classes of the public packages, methods and properties of those classes."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import stp_fx

PUBLIC = (
    "stp_fx",
    "stp_fx.passes",
    "stp_fx.criteria",
    "stp_fx.schedules",
    "stp_fx.regularizers",
    "stp_fx.rules",
    "stp_fx.errors",
    "stp_fx.testing",
    "stp_fx.selection",
    "stp_fx.integrations",
    "stp_fx.integrations.accelerate",
    "stp_fx.integrations.lightning",
    "stp_fx.integrations.transformers",
)


def module_named(name: str) -> ModuleType:
    """``stp_fx.schedules`` and ``stp_fx.regularizers`` are attributes of the package, not modules of their own."""
    attribute = getattr(stp_fx, name.removeprefix("stp_fx."), None)
    return attribute if isinstance(attribute, ModuleType) else importlib.import_module(name)


def documented(owner: ModuleType) -> Iterator[tuple[str, Any]]:
    """The module, and what its ``__all__`` names, with members of classes; plain values have no docstrings at run time."""
    yield owner.__name__, owner
    for name in owner.__all__:
        value = getattr(owner, name)
        if inspect.isclass(value) and value.__module__.startswith("stp_fx"):
            yield name, value
            yield from members(name, value)
        elif inspect.isfunction(value) or isinstance(value, ModuleType):
            yield name, value


def members(name: str, cls: type) -> Iterator[tuple[str, Any]]:
    for each in cls.__mro__:
        if not each.__module__.startswith("stp_fx"):
            continue
        for own, value in vars(each).items():
            kinds = (classmethod, staticmethod, property, functools.cached_property)
            if not own.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds)):
                yield f"{name}.{own}", getattr(value, "__func__", inspect.getattr_static(cls, own))


def text_of(value: Any) -> str:
    """The docstring, which a method may have from the one that it overrides; "" for the text that dataclasses make up."""
    found = inspect.getdoc(value) or ""
    return "" if inspect.isclass(value) and found.startswith(f"{value.__name__}(") else found


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name: str) -> None:
    if name.count(".") == 2:
        pytest.importorskip(name, exc_type=ImportError)
    checked = list(documented(module_named(name)))
    missing = [own for own, value in checked if len(text_of(value).split()) < 2]
    assert not missing, f"without a docstring: {', '.join(dict.fromkeys(missing))}"
