"""Python objects by name: ``package.module:attribute`` or ``path/to/file.py:attribute``."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from stp_fx.errors import InputError

__all__ = ["called", "close_to", "importable", "installed_only", "named_object"]


@contextlib.contextmanager
def importable(folder: str) -> Iterator[None]:
    """The folder's modules can be imported for a while, as under ``python -m``; a console script lacks its own folder."""
    before = list(sys.path)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def installed_only() -> Iterator[None]:
    """Imports do not see the current folder."""
    before, here = list(sys.path), os.path.realpath(os.getcwd())
    sys.path[:] = [folder for folder in before if folder and os.path.realpath(folder) != here]
    try:
        yield
    finally:
        sys.path[:] = before


def named_object(spec: str, option: str) -> Any:
    """The object that ``spec`` names; ``option`` is where it was given, for errors.

    Raises:
        InputError: no colon, no such file or module, one that fails as it is imported, no such attribute (suggests close ones).
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise InputError(f"{option}: {spec!r} names no object; write package.module:name or path/to/file.py:name")
    module = _from_file(where, option) if where.endswith(".py") else _from_package(where, option)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [each for each in vars(found) if not each.startswith("_")]
            raise InputError(f"{option}: {where} has no {name!r}{close_to(name, public)}")
        found = getattr(found, part)
    return found


def called(function: Any, spec: str, option: str, arguments: dict[str, Any] | None = None) -> Any:
    """The result of a factory; an exception in it becomes one line that names the factory.

    Raises:
        InputError: the call failed.
    """
    try:
        return function(**(arguments or {}))
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in (arguments or {}).items())
        raise InputError(f"{option}: {spec}({shown}) raised {type(error).__name__}: {error}") from error


def close_to(name: str, known: Iterable[str], shown: int = 3) -> str:
    """``; did you mean ...?``, or nothing."""
    every = list(known)
    longer = sorted((each for each in every if name and name.lower() in each.lower()), key=len)
    close = list(dict.fromkeys([*longer, *difflib.get_close_matches(name, every, n=shown, cutoff=0.55)]))[:shown]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _from_file(path: str, option: str) -> types.ModuleType:
    file = pathlib.Path(path)
    if not file.is_file():
        raise InputError(f"{option}: there is no file {path!r} (looked in {os.getcwd()})")
    # One module a file, whatever it is asked for: a model's classes and its data's must be the same objects.
    name = f"{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with importable(str(file.resolve().parent)):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{option}: {path} fails as it is imported: {type(error).__name__}: {error}") from error
    return module


def _from_package(name: str, option: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(f"{option}: there is no module {error.name!r}, here ({os.getcwd()}) or installed") from error
        raise InputError(f"{option}: {name} needs a module that is not installed: {error.name!r}") from error
    except Exception as error:
        raise InputError(f"{option}: {name} fails as it is imported: {type(error).__name__}: {error}") from error
