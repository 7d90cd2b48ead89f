"""Checkpoints that do not fit the machine: cut tensor by tensor, from safetensors to safetensors."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.checks import is_whole, shown
from stp_fx.errors import FileError, InputError, translated
from stp_fx.io.sources import opened, sources_of
from stp_fx.paths import path_of
from stp_fx.rewrite.removal import is_partial, remove
from stp_fx.rewrite.rms_norm import rms_scale_factors
from stp_fx.rewrite.slicing import take
from stp_fx.selection import PrunePlan

__all__ = ["prune_shards"]

Files = Mapping[Path, tuple[str, ...]]
_INDEX = "model.safetensors.index.json"


def prune_shards(gm: fx.GraphModule, plan: PrunePlan, source: Any, target: Any, *, max_shard_bytes: int = 2_000_000_000) -> None:
    """Cuts a checkpoint of the unpruned network by ``plan``; holds one tensor and one shard of the result at a time.

    Together with a network on the meta device this prunes what does not fit into memory: trace it there, plan, cut its
    files, and load them into ``stp_fx.apply_plan(gm, plan)`` where there is room for what is left
    (``load_state_dict(tensors, assign=True)``).

    Args:
        gm: the unpruned network, as :func:`stp_fx.trace` captured it; it may be on the meta device.
        source: a safetensors file, or a folder of them. Of a folder with Hugging Face's index, what that lists is read; in one
            without, each tensor must lie in one file alone.
        target: a new folder: numbered shards and ``model.safetensors.index.json``. It appears whole or not at all.
        max_shard_bytes: of the tensors in one file; a single larger tensor gets a file of its own.

    Raises:
        InputError: not a plan, no positive size, or tensors that a plan cannot cut one by one (index buffers).
        PlanError: the plan does not fit ``gm``.
        FileError: ``source`` cannot be read or does not hold this network (names the first tensor that differs), ``target``
            exists, or cannot be written.
    """
    if not isinstance(plan, PrunePlan):
        raise InputError(f"`plan` is a {type(plan).__name__}; give a PrunePlan (stp_fx.plan_of)")
    if not is_whole(max_shard_bytes) or max_shard_bytes < 1:
        raise InputError(f"`max_shard_bytes` is a positive number of bytes; got {shown(max_shard_bytes)}")
    folder = Path(path_of(target))
    if _exists(folder):
        raise FileError(f"{str(folder)!r} exists; give a folder that does not")
    files = sources_of(Path(path_of(source)))
    cuts = _cuts(gm, plan, files)
    graph = analyze(gm)
    factors = rms_scale_factors(gm, graph, graph.survivors(plan, partial=is_partial(gm)))
    partial = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}.tmp")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        with translated(FileError, lambda said: f"{str(folder)!r} cannot be written: {said}"):
            partial.mkdir(parents=True)
            _write(partial, _cut_tensors(files, cuts, factors), max_shard_bytes)
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # it holds the result
                parent.rmdir()


def _exists(folder: Path) -> bool:
    try:
        return os.path.lexists(folder.resolve())
    except (OSError, RuntimeError) as error:
        raise FileError(f"{str(folder)!r} cannot be written: {error}") from error


def _cuts(gm: fx.GraphModule, plan: PrunePlan, files: Files) -> dict[str, dict[int, np.ndarray]]:
    """What stays of every tensor in the files, once their names and shapes are known to be those of the network."""
    graph = analyze(gm)
    remove(gm, plan)  # the plan fits, and gives a network that runs
    tensors = {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
    by_name: dict[str, dict[int, np.ndarray]] = {}
    for (name, dim), kept in plan.kept.items():
        by_name.setdefault(name, {})[dim] = kept
    found: dict[str, dict[int, np.ndarray]] = {}
    for path, names in files.items():
        with opened(path) as file:
            for name in names:
                if name not in tensors:
                    raise FileError(f"{str(path)!r} holds {name!r}, which the network does not have")
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(tensors[name].shape):
                    raise FileError(f"{name!r} has shape {shape} in {str(path)!r}, {tuple(tensors[name].shape)} in the network")
                if name in graph.index_buffers and by_name:
                    raise InputError(f"{name!r} holds positions along an axis, which files cannot be cut by: prune in memory")
                found[name] = by_name.get(graph.first_name(str(name)), {})
    _all_there(gm, tensors, set(found))
    return found


def _all_there(gm: fx.GraphModule, tensors: Mapping[str, torch.Tensor], names: set[str]) -> None:
    """Every tensor that a state dict has must be in the files, under one of its names."""
    held = {id(tensors[name]) for name in names}
    for name in gm.state_dict():
        if id(tensors[name]) not in held:
            raise FileError(f"the files do not hold {name!r}")


def _cut_tensors(
    files: Files, cuts: Mapping[str, dict[int, np.ndarray]], factors: Mapping[str, float]
) -> Iterator[tuple[str, torch.Tensor]]:
    for path, names in files.items():
        with opened(path) as file:
            for name in names:
                try:
                    tensor = file.get_tensor(name)
                except Exception as error:  # whatever the parser says
                    raise FileError(f"{name!r} cannot be read from {str(path)!r}: {error}") from error
                cut = take(tensor, cuts[name])
                yield name, cut.mul_(factors[name]) if name in factors else cut


def _write(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], limit: int) -> None:
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0

    def close() -> None:
        save_file(shard, str(folder / f"{len(shards)}.part"), {"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        length = tensor.numel() * tensor.element_size()
        if shard and size + length > limit:
            close()
            size = 0
        shard[name] = tensor
        size, total = size + length, total + length
    close()
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(folder / f"{number}.part", folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
