"""The common parts of the networks of the pretrained benchmark, and sentences of Python's own documentation."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import random
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

__all__ = ["BATCH", "Network", "Scores", "folder_of", "own_module", "sentences"]

Scores = dict[str, float]
BATCH = 32
LETTERS, SHORTEST, LONGEST = 0.75, 6, 32  # a sentence: fraction of letters, words
OTHERS = {"site-packages", "dist-packages", "test", "tests", "lib2to3"}  # below the standard library and no part of it


@dataclasses.dataclass(frozen=True)
class Network:
    """``calibration``: batches, tuples whose first entries the model takes. ``chosen_on`` and ``scores`` of a module: on the data
    on which methods are chosen, and on those that are reported; of both, the first score ranks, and higher is better.

    ``pinned``: modules that another pruner must be told to leave whole, for the output to keep its width.
    """

    model: nn.Module
    example: tuple[Tensor, ...]
    calibration: list[tuple[Tensor, ...]]
    chosen_on: Callable[[nn.Module], Scores]
    scores: Callable[[nn.Module], Scores]
    pinned: Sequence[nn.Module]


def folder_of(package: str, command: str) -> Path:
    """Where a package lies; it is not imported.

    Raises:
        SystemExit: it is not installed; names the command.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: {command}")
    return Path(spec.origin).parent


def own_module(file: Path, name: str, stand_ins: Mapping[str, types.ModuleType]) -> types.ModuleType:
    """A package's own file as a module, without its ``__init__``; for what it imports and is not needed here, ``stand_ins``."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = {key: sys.modules.get(key) for key in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(module)
    finally:
        for key, old in before.items():
            del sys.modules[key]
            if old is not None:
                sys.modules[key] = old
    sys.modules[name] = module
    return module


def sentences(calibration: int, chosen_on: int, test: int) -> tuple[list[str], list[str], list[str]]:
    """First sentences of docstrings of the standard library; those that calibrate, choose and test are of different modules."""
    found: tuple[list[str], list[str], list[str]] = ([], [], [])
    seen: set[str] = set()
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in library.rglob("*.py") if not OTHERS.intersection(f.relative_to(library).parts))
    for number, file in enumerate(files):
        for text in _docstrings(file):
            sentence = re.split(r"(?<=[.!?])\s|\n\s*\n", text.strip())[0]
            sentence = " ".join(sentence.split())
            letters = sum(c.isalpha() or c == " " for c in sentence)
            if SHORTEST <= len(sentence.split()) <= LONGEST and letters > LETTERS * len(sentence) and sentence not in seen:
                seen.add(sentence)
                found[(0, 1, 0, 2)[number % 4]].append(sentence)
    for texts in found:
        random.Random(0).shuffle(texts)
    return found[0][:calibration], found[1][:chosen_on], found[2][:test]


def _docstrings(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in strings
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
