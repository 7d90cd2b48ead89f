"""Configs of fewer layers: the fields with which the class builds the model that is left."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from stp_fx.errors import WriteBackError
from stp_fx.text import listed
from stp_fx.writeback.config import built_on_meta, config_parts
from stp_fx.writeback.layers import Layers
from stp_fx.writeback.tensors import is_number, is_numbers, tensors_of

__all__ = ["fit_depth"]

Edit = tuple[str, str, Any]
"""The path of a config in the config, its attribute, and the new value."""
Plain = (bool, int, float, str, type(None))
_BUILDS = 64


def fit_depth(short: nn.Module, model: nn.Module, layers: Sequence[Layers]) -> None:
    """Renews the config that ``short``, a copy of ``model`` without some layers, holds, and what the class computes from it.

    A number is that of the layers if the class builds as many of them with another number. Lists of that length in the same
    config lose the entries of the removed layers; other lists of positions, and numbers of layers before a boundary, are
    renewed where the class then builds more of the modules that are left. It counts only if every module that is left is
    built with the same class, tensors and plain attributes.

    Raises:
        WriteBackError: no such config; names what the class builds otherwise.
    """
    config: Any = model.config
    usual = _attribute_differences(built_on_meta(model, config), model, ())
    edits: list[Edit] = []
    for each in layers:
        edits += _count_edits(model, config, edits, each)
    edits, differences = _refined(model, config, edits, short, layers, usual)
    if differences:
        name = type(config).__name__
        raise WriteBackError(
            f"no {name} describes the layers of {type(model).__name__} that are left: {listed(differences, 4)}. Remove layers "
            "that the config can be without (the last ones of a kind), or take strict_config=False for a module that runs but "
            "does not survive from_pretrained",
            tuple(differences[:12]),
        )
    built = built_on_meta(model, _edited(config, edits))
    assert built is not None
    for path, name, value in edits:
        setattr(config_parts(short.config)[path], name, copy.deepcopy(value))
    _take_over(short, built, layers)


def _edited(config: Any, edits: Sequence[Edit]) -> Any:
    result = copy.deepcopy(config)
    try:
        for path, name, value in edits:
            setattr(config_parts(result)[path], name, copy.deepcopy(value))
    except Exception:  # whatever a config's own validation raises
        return None
    return result


def _count_edits(model: nn.Module, config: Any, before: Sequence[Edit], layers: Layers) -> list[Edit]:
    """The field that says how many layers a container has, and the lists with an entry for each.

    Raises:
        WriteBackError: no field does.
    """
    old, new = len(layers.names), len(layers.kept)
    for path, part in config_parts(_edited(config, before)).items():
        shorter = [(path, name, _picked(value, layers)) for name, value in vars(part).items() if _is_per_layer(value, old)]
        for name, value in vars(part).items():
            for number in _with_number(value, old, new):
                for also in (shorter, []):
                    edits = [*(edit for edit in also if edit[1] != name), (path, name, number)]
                    built = built_on_meta(model, _edited(config, [*before, *edits]))
                    if built is not None and _length(built, layers.path) == new:
                        return edits
        built = built_on_meta(model, _edited(config, [*before, *shorter])) if shorter else None
        if built is not None and _length(built, layers.path) == new:
            return shorter
    raise WriteBackError(
        f"no field of {type(config).__name__} says that '{layers.path}' has {old} layers, so none can say that {new} are left. "
        "Go on with the GraphModule, or take strict_config=False for a module that runs but does not survive from_pretrained",
        (layers.path,),
    )


def _is_per_layer(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count


def _picked(value: Any, layers: Layers) -> Any:
    return type(value)([value[k] for k in layers.kept])


def _with_number(value: Any, old: int, new: int) -> Iterator[Any]:
    """A value with one number replaced."""
    if is_number(value) and value == old:
        yield new
    elif is_numbers(value):
        for k, number in enumerate(value):
            if number == old:
                yield type(value)([*value[:k], new, *value[k + 1 :]])


def _length(built: nn.Module, path: str) -> int:
    try:
        return len(built.get_submodule(path)._modules)
    except AttributeError:
        return -1


def _refined(
    model: nn.Module, config: Any, edits: list[Edit], short: nn.Module, layers: Sequence[Layers], usual: set[tuple[str, str]]
) -> tuple[list[Edit], list[str]]:
    """More edits, one after the other, as long as each lets the class build more of what is left; what it builds otherwise."""

    def differences(more: Sequence[Edit]) -> list[str]:
        return _differences(built_on_meta(model, _edited(config, [*edits, *more])), short, layers, usual)

    more: list[Edit] = []
    best = differences(more)
    options = list(itertools.islice(_positions(_edited(config, edits), edits, layers), _BUILDS))
    while best:
        tried = [(differences([*more, option]), option) for option in options]
        found, option = min(tried, key=lambda each: len(each[0]), default=(best, None))
        if option is None or len(found) >= len(best):
            break
        best, more = found, [*more, option]
    return [*edits, *more], best


def _positions(config: Any, edits: Sequence[Edit], layers: Sequence[Layers]) -> Iterator[Edit]:
    """New values of fields that list positions of layers, or say how many come before a boundary."""
    known = {(path, name) for path, name, _ in edits}
    for each in layers:
        for path, part in config_parts(config).items():
            for name, value in vars(part).items():
                if (path, name) in known or name.startswith("_"):
                    continue
                if is_numbers(value) and all(0 <= v < len(each.names) for v in value):
                    yield path, name, type(value)([each.kept.index(v) for v in value if v in each.kept])
                elif is_number(value) and 0 < value <= len(each.names):
                    new = sum(k < value for k in each.kept)
                    if new != value:
                        yield path, name, new


def _differences(built: nn.Module | None, short: nn.Module, layers: Sequence[Layers], usual: set[tuple[str, str]]) -> list[str]:
    """The modules that the class builds otherwise than they are in ``short``; the first entry if it refuses the config."""
    if built is None:
        return ["the class refuses the config"] * 100_000
    wanted, made = ({name: t.shape for name, t in tensors_of(m).items()} for m in (short, built))
    names = [f"'{name}' is not built" for name in wanted.keys() - made.keys()]
    names += [f"'{name}' is built" for name in made.keys() - wanted.keys()]
    names += [f"'{name}' is built as {list(made[name])}" for name in wanted.keys() & made.keys() if made[name] != wanted[name]]
    found = _attribute_differences(built, short, layers)
    names += [f"'{path}' has another {name}" for path, name in found if (_kind(short, path), name) not in usual]
    return sorted(names)


def _kind(module: nn.Module, path: str) -> str:
    return type(module.get_submodule(path)).__name__


def _attribute_differences(built: nn.Module | None, module: nn.Module, layers: Sequence[Layers]) -> set[tuple[str, str]]:
    """The plain attributes in which modules differ: paths below ``layers`` with names, or, without them, classes with names."""
    if built is None:
        return set()
    parts = dict(built.named_modules())
    inside = tuple(f"{each.path}." for each in layers)
    found: set[tuple[str, str]] = set()
    for path, part in module.named_modules():
        other = parts.get(path)
        if other is None or (layers and not path.startswith(inside)):
            continue
        label = path if layers else type(part).__name__
        if type(other) is not type(part):
            found.add((label, "class"))
            continue
        found |= {(label, name) for name, value in _plain(part).items() if _plain(other).get(name, part) != value}
    return found


def _plain(module: nn.Module) -> Mapping[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Plain) and name != "training"}


def _take_over(short: nn.Module, built: nn.Module, layers: Sequence[Layers]) -> None:
    """The plain attributes around the layers that the class computes from the config, such as their number."""
    inside = tuple(f"{each.path}." for each in layers)
    before = dict(built.named_modules())
    for path, part in short.named_modules():
        other = before.get(path)
        if path.startswith(inside) or other is None or type(other) is not type(part):
            continue
        fresh = _plain(other)
        for name, value in _plain(part).items():
            if is_number(value) and is_number(fresh.get(name)):
                vars(part)[name] = fresh[name]
