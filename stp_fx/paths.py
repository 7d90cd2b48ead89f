"""Paths that callers give, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from typing import Any

from stp_fx.checks import shown
from stp_fx.errors import FileError, InputError, translated

__all__ = ["path_of", "replacing"]


def path_of(path: Any) -> str:
    """A path as text.

    Raises:
        InputError: no path, or one that no file can have.
    """
    try:
        text = os.fsdecode(path)
        os.fsencode(text)
    except TypeError:
        raise InputError(f"`path` is a {type(path).__name__}; give a file name") from None
    except Exception as error:  # what cannot be encoded, or an object's own code
        raise InputError(f"`path` is {shown(path)}, which cannot be a file name here ({error}); give another name") from None
    if "\0" in text:
        raise InputError(f"`path` is {path!r}: it holds a null character, which no file name can; give another name")
    return text


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """The name of a new file beside ``path``, which is renamed to it at the end: ``path`` is always a whole file, old or new.

    Raises:
        FileError: the file cannot be written, or ``path`` is no regular file; what was there is as it was.
    """
    target = os.path.realpath(path)  # a symbolic link stays one
    folder = os.path.dirname(target)
    partial = os.path.join(folder, f".stp_fx-{secrets.token_hex(8)}.tmp")
    try:
        with translated(FileError, lambda said: f"{path!r} cannot be written: {said}"):
            _check_replaceable(target)
            with open(partial, "xb") as created:  # some writers give files to their owner alone; this has the user's umask
                mode = stat.S_IMODE(os.stat(target if os.path.exists(target) else created.fileno()).st_mode)
            yield partial
            with open(partial, "rb+") as written:
                os.chmod(partial, mode)
                os.fsync(written.fileno())
            os.replace(partial, target)
            _sync_folder(folder)
    finally:
        with contextlib.suppress(OSError):  # it has been renamed, or never was
            os.remove(partial)


def _check_replaceable(path: str) -> None:
    """Refuses what a rename would destroy.

    Raises:
        OSError: the path exists and is no regular file, or cannot be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise OSError(f"it is {kind}, which is never replaced; give the name of a file")


def _sync_folder(folder: str) -> None:
    """The new name itself is on disk, where the system can do that; the file is in its place already."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
