"""A network's tensors in safetensors files, read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import fx

from stp_fx.errors import FileError, InputError
from stp_fx.io.sources import opened, sources_of
from stp_fx.ir.streamed import Streamed, stand_ins
from stp_fx.rewrite.slicing import copied

__all__ = ["Checkpoint"]


class Checkpoint(Mapping[str, torch.Tensor]):
    """The values of parameters and buffers of ``gm``, by all of their names: each is read when it is asked for, in the dtype of
    ``gm``. Tensors that the files do not have are those of ``gm``.

    Raises:
        FileError: ``source`` cannot be read or does not hold this network (names the first tensor that differs).
    """

    def __init__(self, gm: fx.GraphModule, source: Path) -> None:
        self.files: Mapping[Path, tuple[str, ...]] = sources_of(source)
        self._tensors = {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
        self._places: dict[int, tuple[Path, str]] = {}
        for path, names in self.files.items():
            with opened(path) as file:
                for name in names:
                    self._check(path, name, tuple(file.get_slice(name).get_shape()))
                    self._places.setdefault(id(self._tensors[name]), (path, name))
        for name in gm.state_dict():
            if id(self._tensors[name]) not in self._places:
                raise FileError(f"the files do not hold {name!r}")

    def _check(self, path: Path, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._tensors:
            raise FileError(f"{str(path)!r} holds {name!r}, which the network does not have")
        if shape != tuple(self._tensors[name].shape):
            raise FileError(f"{name!r} has shape {shape} in {str(path)!r}, {tuple(self._tensors[name].shape)} in the network")

    @property
    def in_files(self) -> tuple[str, ...]:
        """All names of the tensors that the files have."""
        return tuple(name for name, tensor in self._tensors.items() if id(tensor) in self._places)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if id(tensor) not in self._places:
            return tensor.detach()
        path, stored = self._places[id(tensor)]
        with opened(path) as file:
            try:
                return file.get_tensor(stored).to(tensor.dtype, copy=True)
            except Exception as error:  # whatever the parser says
                raise FileError(f"{stored!r} cannot be read from {str(path)!r}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def all(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name as the files have them, in their order and dtype."""
        for path, names in self.files.items():
            with opened(path) as file:
                for name in names:
                    try:
                        tensor = file.get_tensor(name)
                    except Exception as error:  # whatever the parser says
                        raise FileError(f"{name!r} cannot be read from {str(path)!r}: {error}") from error
                    yield name, tensor

    def same(self, name: str) -> tuple[str, ...]:
        """All names of a tensor."""
        return tuple(other for other, tensor in self._tensors.items() if tensor is self._tensors[name])

    def streamed(
        self,
        gm: fx.GraphModule,
        device: torch.device,
        read: Callable[[str], torch.Tensor],
        write: Callable[[str, torch.Tensor], None] | None = None,
    ) -> Streamed:
        """A copy of ``gm``, which is the network or what a removal made of it, whose tensors are read when nodes need them.

        Raises:
            InputError: a tensor is on the meta device and not in the files (names it).
        """
        lost = next((n for n, t in self._tensors.items() if t.is_meta and id(t) not in self._places), None)
        if lost is not None:
            raise InputError(
                f"{lost!r} has no numbers, so the network cannot be run: it is on the meta device, and the files do not have it, "
                f"since it is not persistent. Set it first: gm.{lost} = ... (what the model computes on a real device)"
            )
        host = copied(gm, stand_ins(gm, self.in_files, device))
        return Streamed(host, self.in_files, lambda name: read(name).to(device), write)
