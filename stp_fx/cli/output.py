"""Output of a command: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from stp_fx.errors import InputError
from stp_fx.terminal import Console, RenderableType, Text

__all__ = ["Output", "checked_output"]

_PIPED_WIDTH = 120
"""Columns when standard output is no terminal: tables are as wide as they need to be below that."""
_NARROW = 100


@dataclasses.dataclass(frozen=True)
class Output:
    """``as_json``: one JSON object in place of tables. ``quiet``: no notes, no progress."""

    as_json: bool = False
    quiet: bool = False

    def result(self, data: dict[str, Any], *shown: RenderableType) -> None:
        """The result of the command: ``data`` with ``--json``, else ``shown``."""
        if self.as_json:
            _write(json.dumps(_finite({"schema": 1, **data}), indent=2, allow_nan=False) + "\n")
            return
        console, terminal = _console(), sys.stdout.isatty()
        with console.capture() as captured:
            for each in shown:
                # Lines are broken on terminals alone; text for a program or a document is not changed.
                as_it_is = isinstance(each, Text) and (each.no_wrap or not terminal)
                console.print(each, highlight=False, soft_wrap=as_it_is)
        _write("\n".join(line.rstrip(" ") for line in captured.get().split("\n")))

    @property
    def narrow(self) -> bool:
        """Whether results go to a terminal that has no room for columns of names."""
        return _console().width < _NARROW

    def note(self, text: str) -> None:
        """A line for people, on standard error."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Names the work in progress; on a terminal only, and erased afterwards."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        with Console(stderr=True).status(text):
            yield


def checked_output(path: str, suffixes: tuple[str, ...], *, overwrite: bool) -> pathlib.Path:
    """A path that can be written to, found out before the work rather than after it.

    Raises:
        InputError: another suffix, a folder that does not exist, a file that does and is not to be overwritten.
    """
    target = pathlib.Path(path)
    if target.suffix not in suffixes:
        raise InputError(f"--output: {path!r} must end in {' or '.join(suffixes)}")
    if not target.parent.is_dir():
        raise InputError(f"--output: there is no folder {str(target.parent)!r}")
    if target.is_dir():
        raise InputError(f"--output: {path!r} is a folder")
    if target.exists() and not overwrite:
        raise InputError(f"--output: {path!r} exists already; --force overwrites it")
    return target


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _console() -> Console:
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH)


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
