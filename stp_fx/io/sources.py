"""Which tensors of a checkpoint lie in which of its files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from stp_fx.errors import FileError
from stp_fx.io.contents import unique_names

__all__ = ["opened", "sources_of"]

_INDEX = ".safetensors.index.json"


def sources_of(source: Path) -> dict[Path, tuple[str, ...]]:
    """The files of a checkpoint with the names of the tensors that each is read for: every name once.

    Of a folder with an index (Hugging Face's), what the index lists and nothing else; of one without, all its safetensors files.

    Raises:
        FileError: no checkpoint, an index that does not fit its files, or a name that lies in two files without an index.
    """
    if not _is(source, "is_dir"):
        if not _is(source, "is_file"):
            raise FileError(f"{str(source)!r} is no safetensors file, and no folder that holds any")
        return {source: _names(source)}
    indexes = sorted(source.glob(f"*{_INDEX}"))
    if len(indexes) > 1:
        raise FileError(
            f"{str(source)!r} holds several indexes, {indexes[0].name!r} and {indexes[1].name!r}: "
            "give a folder with one, or one safetensors file"
        )
    return _listed(source, indexes[0]) if indexes else _found(source)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors can be read one by one.

    Raises:
        FileError: no such file, or not of that format.
    """
    try:
        file = safe_open(str(path), framework="pt", device="cpu")
    except Exception as error:  # whatever the parser says
        raise FileError(f"{str(path)!r} is no safetensors file, or damaged: {error}") from error
    with file as reader:
        yield reader


def _is(path: Path, what: str) -> bool:
    try:
        return bool(getattr(path, what)())
    except (OSError, ValueError) as error:
        raise FileError(f"{str(path)!r} cannot be read: {error}") from error


def _names(path: Path) -> tuple[str, ...]:
    with opened(path) as file:
        return tuple(file.keys())


def _found(folder: Path) -> dict[Path, tuple[str, ...]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files or not all(_is(path, "is_file") for path in files):
        raise FileError(f"{str(folder)!r} is no safetensors file, and no folder that holds any")
    result, first = {path: _names(path) for path in files}, dict[str, Path]()
    for path, names in result.items():
        for name in names:
            if first.setdefault(name, path) != path:
                raise FileError(
                    f"{name!r} lies in two files of {str(folder)!r}, {first[name].name!r} and {path.name!r}, and no "
                    f"*{_INDEX} says which one counts: move the stray file out of the folder"
                )
    return result


def _listed(folder: Path, index: Path) -> dict[Path, tuple[str, ...]]:
    places = _weight_map(index)
    by_file: dict[str, list[str]] = {}
    for name, file in places.items():
        by_file.setdefault(file, []).append(name)
    result: dict[Path, tuple[str, ...]] = {}
    for file, names in sorted(by_file.items()):
        path = folder / file
        if not _is(path, "is_file"):
            raise FileError(f"{str(index)!r} lists {names[0]!r} in {file!r}, but there is no such file beside it")
        held = set(_names(path))
        lost = next((name for name in names if name not in held), None)
        if lost is not None:
            raise FileError(f"{str(index)!r} lists {lost!r} in {file!r}, which does not hold it")
        extra = min((name for name in held if name not in places), default=None)
        if extra is not None:
            raise FileError(f"{str(path)!r} holds {extra!r}, which {index.name!r} does not list: they are of two checkpoints")
        result[path] = tuple(names)
    return result


def _weight_map(index: Path) -> Mapping[str, str]:
    """Files by tensor name.

    Raises:
        FileError: the index cannot be read, or is none.
    """
    try:
        document = json.loads(index.read_bytes(), object_pairs_hook=unique_names)
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{str(index)!r} cannot be read as an index of safetensors files: {str(error)[:200]}") from error
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places or not all(type(file) is str for file in places.values()):
        raise FileError(f"{str(index)!r} is no index of safetensors files: it has no `weight_map` of names to files")
    for file in places.values():
        if os.path.basename(file) != file or not file.endswith(".safetensors") or "\0" in file:
            raise FileError(f"{str(index)!r} lists {file[:80]!r}, which is no safetensors file beside it")
    return places
