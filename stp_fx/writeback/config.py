"""Configs: the fields with which the class builds the smaller module itself, so that saving and loading it works."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from stp_fx.errors import WriteBackError
from stp_fx.text import listed
from stp_fx.writeback.check import Check
from stp_fx.writeback.sizes import KINDS, Sizes
from stp_fx.writeback.tensors import is_number, is_numbers, numbers_in, tensors_of

__all__ = ["built_on_meta", "config_parts", "fit_config"]

_log = logging.getLogger(__name__)
_BUILDS, _LOADS = 512, 24
"""How many combinations of fields are built for their shapes, and how many of those that fit are run, at most."""

Shapes = dict[str, torch.Size]
Field = tuple[str, str, int]
"""The path of a config in the config, its attribute, and the position in it (-1: it is no sequence)."""
Choice = dict[Field, int]


def fit_config(result: nn.Module, model: nn.Module, sizes: Sizes, graph: fx.GraphModule, check: Check) -> None:
    """Renews ``result.config`` so that ``type(result)(config)``, given the tensors of ``graph``, passes ``check``.

    The numbers that the class computes from the config are taken over as well.

    Raises:
        WriteBackError: no such config; names the fields, and the tensors that they do not fit.
    """
    reached = _read(graph)
    wanted = {name: shape for name, shape in _shapes(result).items() if name in reached}
    config: Any = model.config
    best: tuple[int, Choice] = (_misfits(_built_shapes(model, config), wanted), {})
    said, loads = "", 0
    off: list[str] = []
    for choice in itertools.islice(_choices(model, config, sizes, wanted, _numbers(result)), _BUILDS):
        changed = _changed(config, choice)
        count = _misfits(_built_shapes(model, changed), wanted)
        if count < best[0]:
            best = (count, choice)
        if count or loads == _LOADS:
            continue
        loads += 1
        built, said = _loaded(model, changed, graph, result, check, reached)
        if built is not None and not said:
            _take_over(result, built, choice)
            _renew(result, built)
            return
        off = off or ([] if built is None else _computed(built, result, reached))
    raise _refusal(model, config, best[1], wanted, said, sizes, off)


def _shapes(module: nn.Module) -> Shapes:
    return {name: tensor.shape for name, tensor in tensors_of(module).items()}


def _numbers(module: nn.Module) -> dict[str, Any]:
    """The numbers that the modules hold, by path: heads, sizes, scales."""
    return {
        f"{path}.{key}": value
        for path, part in module.named_modules()
        for key, value in vars(part).items()
        if type(value) in (int, float) or is_numbers(value)
    }


def built_on_meta(model: nn.Module, config: Any) -> nn.Module | None:
    """The module that the class makes of a config, on meta; ``None`` if it refuses it."""
    if config is None:
        return None
    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(config))
    except Exception as error:
        _log.debug("config refused: %s", error)
        return None


def _built_shapes(model: nn.Module, config: Any) -> Shapes | None:
    built = built_on_meta(model, config)
    return None if built is None else _shapes(built)


def _misfits(built: Shapes | None, wanted: Shapes) -> int:
    """In how many dimensions the tensors differ."""
    if built is None:
        return 1 << 30
    names = sum(1000 for name in wanted if name not in built)
    return names + sum(_differs(built[name], wanted[name]) for name in set(built) & set(wanted))


def _differs(one: torch.Size, other: torch.Size) -> int:
    return sum(a != b for a, b in zip(one, other)) if len(one) == len(other) else 10


def config_parts(config: Any, path: str = "") -> dict[str, Any]:
    """The config and the configs in it, by path."""
    found = {path: config}
    for name, part in vars(config).items():
        if hasattr(part, "to_dict") and hasattr(part, "__dict__"):
            found |= config_parts(part, f"{path}.{name}" if path else name)
    return found


def _changed(config: Any, choice: Choice) -> Any:
    """A changed copy; ``None`` if the config refuses the values."""
    result = copy.deepcopy(config)
    try:
        _set(result, choice)
    except Exception as error:  # whatever a config's own validation raises
        _log.debug("value refused: %s", error)
        return None
    return result


def _set(config: Any, choice: Choice) -> None:
    parts = config_parts(config)
    for (path, name, position), number in choice.items():
        value: Any = number
        if position >= 0:
            old = getattr(parts[path], name)
            value = type(old)([*old[:position], number, *old[position + 1 :]])
        setattr(parts[path], name, value)


def _choices(model: nn.Module, config: Any, sizes: Sizes, wanted: Shapes, numbers: Mapping[str, Any]) -> Iterator[Choice]:
    """Combinations of new values of fields, the likely ones first: what makes more tensors fit, and none fit less."""
    before = _built_shapes(model, config)
    ranked: list[tuple[int, Field, list[int | None]]] = []
    for field, options in _options(config, sizes).items():
        gains = {new: _gain(model, config, {field: new}, before, wanted) for new in options}
        useful = [new for new in sorted(options, key=lambda n: -gains[n]) if gains[new] > 0]
        rest = [new for new in options if gains[new] <= 0 and gains[new] > -1000]
        old_known = is_number(_value(config, field))
        if useful:
            ranked.append((0, field, [*useful, None, *(rest if old_known else [])]))
        elif rest and old_known:
            ranked.append((1 if max(gains[new] for new in rest) == 0 else 2, field, [None, *rest]))
    ranked.sort(key=lambda each: each[0])
    start = _descended(model, config, [(field, options) for rank, field, options in ranked if not rank], wanted, {})
    yield _descended(model, config, [(field, options) for _, field, options in ranked], wanted, numbers, start)
    silent = [(field, [None, *filter(None, options)]) for _, field, options in ranked if field not in start]
    for values in itertools.islice(itertools.product(*(options for _, options in silent)), _BUILDS // 2):
        yield {**start, **{field: new for (field, _), new in zip(silent, values) if new is not None}}
    for values in itertools.product(*(options for _, _, options in ranked)):
        yield {field: new for (_, field, _), new in zip(ranked, values) if new is not None}


def _descended(
    model: nn.Module,
    config: Any,
    fields: list[tuple[Field, list[int | None]]],
    wanted: Shapes,
    numbers: Mapping[str, Any],
    start: Choice | None = None,
) -> Choice:
    """One field after the other takes the value with which most tensors fit, and of those the most ``numbers`` of modules
    (heads and scales, which no shape shows), until no value makes more of them fit."""

    def misfits(choice: Choice) -> tuple[int, int]:
        built = built_on_meta(model, _changed(config, choice))
        if built is None:
            return 1 << 30, 0
        held = _numbers(built) if numbers else {}
        return _misfits(_shapes(built), wanted), sum(held.get(name) != value for name, value in numbers.items())

    choice: Choice = dict(start or {})
    count = misfits(choice)
    while any(count):
        steps = [{**choice, field: new} for field, options in fields for new in options if new and choice.get(field) != new]
        counts = [misfits(step) for step in steps]
        if not counts or min(counts) >= count:
            break
        count = min(counts)
        choice = steps[counts.index(count)]
    return choice


def _value(config: Any, field: Field) -> Any:
    value = vars(config_parts(config)[field[0]])[field[1]]
    return value if field[2] < 0 else value[field[2]]


def _options(config: Any, sizes: Sizes) -> dict[Field, list[int]]:
    """New values of every number of a config; a field that says nothing could take any new size."""
    found: dict[Field, list[int]] = {}
    for path, part in config_parts(config).items():
        for name, value in numbers_in(part):
            for position, number in enumerate(value) if isinstance(value, (tuple, list)) else [(-1, value)]:
                became = sizes.what_became(number, ("",))
                new = dict.fromkeys(v for kind in KINDS for v in became.get(kind, []) if v != number)
                if new:
                    found[path, name, position] = list(new)
        empty = [name for name, value in vars(part).items() if value is None and not name.startswith("_")]
        found.update({(path, name, -1): sizes.new_sizes()[:3] for name in empty})
    return found


def _gain(model: nn.Module, config: Any, choice: Choice, before: Shapes | None, wanted: Shapes) -> int:
    """How many more dimensions fit with one field changed; -1000 or less if tensors appear or vanish."""
    after = _built_shapes(model, _changed(config, choice))
    if after is None or before is None:
        return 0
    return _misfits(before, wanted) - _misfits(after, wanted)


def _loaded(
    model: nn.Module, config: Any, graph: fx.GraphModule, like: nn.Module, check: Check, reached: set[str]
) -> tuple[nn.Module | None, str]:
    """The module that the config builds, with the tensors of ``graph``, and how it fails. Tensors that the graph does not reach
    may be built in another shape: nothing says which of their channels would be kept."""
    try:
        built = type(model)(copy.deepcopy(config))
        reference = next((p for p in like.parameters() if p.is_floating_point()), None)
        if reference is not None:
            built = built.to(device=reference.device, dtype=reference.dtype)
        given = tensors_of(graph)
        state: dict[str, torch.Tensor] = {**like.state_dict()}
        state.update({name: given[name] for name in state.keys() & given.keys()})
        for names in _ties(like):
            known = [given[name] for name in names if name in given]
            state.update({name: known[0] for name in names if name in state and known})
        fresh = built.state_dict()
        state.update({k: fresh[k] for k in fresh.keys() & state.keys() - reached if fresh[k].shape != state[k].shape})
        built.load_state_dict(state)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    failure = check(built)
    return built, "" if failure is None else failure.text


def _ties(module: nn.Module) -> list[list[str]]:
    """The names of each tensor that has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors_of(module).items():
        names.setdefault(id(tensor), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _take_over(result: nn.Module, built: nn.Module, choice: Choice) -> None:
    """The config, and every number that the class computed from it."""
    _set(result.config, choice)
    fresh = dict(built.named_modules())
    for name, module in result.named_modules():
        if name in fresh and type(fresh[name]) is type(module):
            for key, value in numbers_in(fresh[name]):
                if key in vars(module):
                    vars(module)[key] = value


def _renew(result: nn.Module, built: nn.Module) -> None:
    """Puts tensors that the class builds in another shape, and the forward does not reach, in place of the larger ones."""
    made, names = tensors_of(built), []
    for name, tensor in tensors_of(result).items():
        if name in made and made[name].shape != tensor.shape:
            owner, _, key = name.rpartition(".")
            part = result.get_submodule(owner)
            new = made[name].detach().to(tensor)
            if isinstance(tensor, nn.Parameter):
                part._parameters[key] = nn.Parameter(new, requires_grad=tensor.requires_grad)
            else:
                part._buffers[key] = new
            names.append(name)
    if names:
        _log.warning(
            "%s: the recorded forward does not reach %s, so nothing says which of their channels to keep: they have been "
            "initialised anew, in the size that the config builds", type(result).__name__, listed(names, 4),
        )  # fmt: skip


def _refusal(
    model: nn.Module, config: Any, choice: Choice, wanted: Shapes, said: str, sizes: Sizes, off: list[str]
) -> WriteBackError:
    built = _built_shapes(model, _changed(config, choice)) or {}
    wrong = [name for name in wanted if name not in built or built[name] != wanted[name]]
    lines = [f"{name} is built as {_said(built, name)}, {_said(wanted, name)} is needed" for name in wrong] or off
    fields = _deciding(model, config, choice, wrong, sizes)
    why = "; ".join(lines[:3]) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")
    why = "; ".join(text for text in (said, why) if text)
    said_of = ", ".join(fields) or "no field"
    text = (
        f"no {type(config).__name__} describes what is left of {type(model).__name__}: {why}. In the way: "
        f"{said_of}. Prune so that all layers agree and the fields can say it (`uniform=True`, `ignore` for what "
        "they cannot), or take strict_config=False for a module that runs but does not survive from_pretrained"
    )
    return WriteBackError(text, (*lines, *fields) if off else (*fields, *lines))


def _read(graph: fx.GraphModule) -> set[str]:
    """The tensors that the graph reads, under all of their names; it may store others that its model stores."""
    targets = {str(node.target) for node in graph.graph.nodes if node.op in ("get_attr", "call_module")}
    tensors = tensors_of(graph)
    read = {id(tensor) for name, tensor in tensors.items() if any(owner in targets for owner in _owners(name))}
    return {name for name, tensor in tensors.items() if id(tensor) in read}


def _owners(name: str) -> list[str]:
    atoms = name.split(".")
    return [".".join(atoms[:end]) for end in range(1, len(atoms) + 1)]


def _said(shapes: Shapes, name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "nothing"


def _deciding(model: nn.Module, config: Any, choice: Choice, wrong: list[str], sizes: Sizes) -> list[str]:
    """The fields that decide the shapes of the tensors; where none is wrong, those that changed."""
    found = []
    before = _built_shapes(model, _changed(config, choice)) or {}
    for field, options in _options(config, sizes).items():
        old = _value(config, field)
        if not is_number(old):
            continue
        other = next((n for n in (*options, old) if n != choice.get(field, old)), old)
        after = _built_shapes(model, _changed(config, {**choice, field: other})) or {}
        moved = any(name in after and after[name] != before.get(name) for name in wrong)
        if moved or (not wrong and field in choice):
            label = ".".join(part for part in ("config", field[0], field[1]) if part) + (f"[{field[2]}]" if field[2] >= 0 else "")
            found.append(f"{label} = {old} (tried {', '.join(map(str, options))})")
    return found


def _computed(built: nn.Module, wanted: nn.Module, reached: set[str]) -> list[str]:
    """Values that the class computes from the config and that differ from those the forward needs: buffers and scales."""
    fresh, saved, result = dict(built.named_modules()), wanted.state_dict(), []
    made = dict(built.named_buffers())
    for name, tensor in wanted.named_buffers():
        if name in reached and name in made and name not in saved and not _equal(tensor, made[name]):
            result.append(f"{name} is not saved but computed, and has other values than the pruned one")
    for name, module in wanted.named_modules():
        for key, needed in vars(module).items():
            value = vars(fresh[name]).get(key) if name in fresh else None
            if isinstance(needed, float) and isinstance(value, float) and value != needed:
                result.append(f"{name}.{key} is computed as {value:.6g}, {needed:.6g} is needed")
    return result


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
