"""Checkpoints that do not fit the machine: cut tensor by tensor, from safetensors to safetensors."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.checks import is_a, is_whole, shown
from stp_fx.errors import FileError, InputError, translated
from stp_fx.io.checkpoint import Checkpoint
from stp_fx.ir.inference_mode import normal_mode
from stp_fx.measure.calibration import reiterable
from stp_fx.paths import path_of
from stp_fx.progress import Progress, carrying
from stp_fx.rewrite.removal import is_partial, remove
from stp_fx.rewrite.rms_norm import rms_scale_factors
from stp_fx.rewrite.sequential import reconstruct_streamed
from stp_fx.rewrite.slicing import take
from stp_fx.selection import PrunePlan

__all__ = ["device_named", "prune_shards"]

_log = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"


def prune_shards(
    gm: fx.GraphModule,
    plan: PrunePlan,
    source: Any,
    target: Any,
    *,
    max_shard_bytes: int = 2_000_000_000,
    compensation: Literal["sequential"] | None = None,
    calibration: Iterable[Any] | None = None,
    memory: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = None,
) -> None:
    """Cuts a checkpoint of the unpruned network by ``plan``; holds one tensor and one shard of the result at a time.

    Together with a network on the meta device this prunes what does not fit into memory: trace it there, plan
    (:func:`plan_shards` scores the files), cut its files, and load them into ``stp_fx.apply_plan(gm, plan)`` where there is room
    for what is left (``load_state_dict(tensors, assign=True)``).

    With ``compensation="sequential"`` layers are refitted as :class:`stp_fx.passes.ReconstructSequentially` does it, in the dtype
    of ``gm``: a network traced in float32 repairs files of bfloat16 in float32, and they stay bfloat16. Weights are read when the
    pass comes to their layer and let go after it; those that change wait in temporary files beside ``target``.

    Args:
        gm: the unpruned network, as :func:`stp_fx.trace` captured it; it may be on the meta device.
        source: a safetensors file, or a folder of them. Of a folder with Hugging Face's index, what that lists is read; in one
            without, each tensor must lie in one file alone.
        target: a new folder: numbered shards and ``model.safetensors.index.json``. It appears whole or not at all.
        max_shard_bytes: of the tensors in one file; a single larger tensor gets a file of its own.
        compensation: None, or "sequential". The others need the whole network in memory.
        calibration: batches for it, as for :func:`stp_fx.prune_graph`; all of them run through each layer in turn.
        memory: bytes of values between layers that are kept in memory (None: half of what is free), the others in files.
        device: where layers are run and refitted.
        progress: of the repair, as for :func:`stp_fx.prune_graph`.

    Raises:
        InputError: not a plan, no positive size, tensors that a plan cannot cut one by one (index buffers), another compensation,
            no batch or one that does not fit, or a buffer without numbers (on the meta device, and not in the files).
        PlanError: the plan does not fit ``gm``.
        FileError: ``source`` cannot be read or does not hold this network (names the first tensor that differs), ``target``
            exists, or cannot be written.
    """
    _check_plan(plan)
    if not is_whole(max_shard_bytes) or max_shard_bytes < 1:
        raise InputError(f"`max_shard_bytes` is a positive number of bytes; got {shown(max_shard_bytes)}")
    data = carrying(_data(compensation, calibration), progress)
    if memory is not None and (not is_whole(memory) or memory < 0):
        raise InputError(f"`memory` is None or a number of bytes; got {shown(memory)}")
    place, folder = device_named(device), Path(path_of(target))
    if _exists(folder):
        raise FileError(f"{str(folder)!r} exists; give a folder that does not")
    with normal_mode():
        cut = _Cut(gm, plan, Path(path_of(source)))
        with _new_folder(folder) as partial:
            if data is not None:
                cut.repair(data, _Repaired(partial / "repaired"), memory, place)
            with _written(folder):
                _write(partial, cut.tensors(), max_shard_bytes)
                shutil.rmtree(partial / "repaired", ignore_errors=True)
                os.replace(partial, folder)


def _check_plan(plan: Any) -> None:
    if not is_a(plan, PrunePlan):
        raise InputError(f"`plan` is a {type(plan).__name__}; give a PrunePlan (stp_fx.plan_of)")
    if plan.blocks:
        raise InputError("`plan` removes blocks, which files cannot be written without: prune in memory")


def device_named(device: Any) -> torch.device:
    """The device of that name.

    Raises:
        InputError: there is no such device.
    """
    with translated(InputError, lambda said: f"`device` is a device such as 'cpu' or 'cuda'; got {shown(device)} ({said})"):
        found = torch.device(device)
        if found.type == "meta":
            raise InputError("`device` is where layers are run: the meta device holds no numbers")
        torch.empty(0, device=found)
    return found


def _data(compensation: Any, calibration: Any) -> Iterable[Any] | None:
    """The batches of a repair; None for none."""
    if compensation is None:
        if calibration is not None:
            raise InputError("`calibration` is read by a repair: give compensation='sequential' with it, or leave it out")
        return None
    if compensation != "sequential":
        raise InputError(
            f"compensation {shown(compensation)} needs the whole network in memory (stp_fx.prune_graph); shard by shard, give "
            "'sequential', or None"
        )
    if calibration is None:
        raise InputError("compensation 'sequential' runs the network: give `calibration`, an iterable of batches")
    return reiterable(calibration)


def _exists(folder: Path) -> bool:
    try:
        return os.path.lexists(folder.resolve())
    except (OSError, RuntimeError) as error:
        raise FileError(f"{str(folder)!r} cannot be written: {error}") from error


def _written(folder: Path) -> contextlib.AbstractContextManager[None]:
    return translated(FileError, lambda said: f"{str(folder)!r} cannot be written: {said}")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder``, which is to be renamed; if it is not, nothing of it is left."""
    partial = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}.tmp")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        with _written(folder):
            partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # it holds the result
                parent.rmdir()


class _Repaired:
    """Tensors that a repair has changed, in files of a folder that is made with the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        path = self._files.get(name, self._folder / f"{len(self._files)}.safetensors")
        with _written(self._folder):
            self._folder.mkdir(exist_ok=True)
            save_file({"tensor": tensor.cpu().contiguous()}, str(path))
        self._files[name] = path

    def read(self, name: str) -> torch.Tensor:
        return load_file(self._files[name])["tensor"].clone()  # its file may be written again

    def __contains__(self, name: str) -> bool:
        return name in self._files


class _Cut:
    """A checkpoint, and what a plan leaves of its tensors.

    Raises:
        FileError: the files do not hold this network.
        InputError: a tensor that cannot be cut.
    """

    def __init__(self, gm: fx.GraphModule, plan: PrunePlan, source: Path) -> None:
        if plan.blocks:
            raise InputError("`plan` removes blocks, which files cannot be written without: prune in memory")
        self._gm, self._plan = gm, plan
        graph = analyze(gm)
        self._small = remove(gm, plan)  # the plan fits, and gives a network that runs
        self._checkpoint = Checkpoint(gm, source)
        by_name: dict[str, dict[int, np.ndarray]] = {}
        for (name, dim), kept in plan.kept.items():
            by_name.setdefault(name, {})[dim] = kept
        self._kept: dict[str, Mapping[int, np.ndarray]] = {}
        for name in self._checkpoint.in_files:
            if name in graph.index_buffers and by_name:
                raise InputError(f"{name!r} holds positions along an axis, which files cannot be cut by: prune in memory")
            self._kept[name] = by_name.get(graph.first_name(name), {})
        self._factors = rms_scale_factors(gm, graph, graph.survivors(plan, partial=is_partial(gm)))
        self._repaired: dict[str, str] = {}
        self._store: _Repaired | None = None

    def repair(self, data: Iterable[Any], store: _Repaired, memory: int | None, device: torch.device) -> None:
        """Refits the layers on ``data``; what changes goes to ``store``."""
        if self._plan.is_empty:
            return
        files = self._checkpoint

        def read(name: str) -> torch.Tensor:
            return store.read(name) if name in store else self._of(name, files[name])

        def write(name: str, tensor: torch.Tensor) -> None:
            store.write(name, tensor)
            self._repaired.update(dict.fromkeys(files.same(name), name))

        self._store = store
        streamed = files.streamed(self._gm, device, files.__getitem__), files.streamed(self._small, device, read, write)
        for node, reason in reconstruct_streamed(self._gm, self._plan, data, streamed, memory).items():
            _log.info("%s is not repaired (sequential): %s", node, reason)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the new files, in the order of the old ones."""
        for name, tensor in self._checkpoint.all():
            if name in self._repaired and self._store is not None:
                yield name, self._store.read(self._repaired[name]).to(tensor.dtype)
            else:
                yield name, self._of(name, tensor)

    def _of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        cut = take(tensor, self._kept[name])
        return cut.mul_(self._factors[name]) if name in self._factors else cut


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
