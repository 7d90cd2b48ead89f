"""Reading and writing safetensors files: whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stp_fx.errors import FileError
from stp_fx.paths import replacing

__all__ = ["read_file", "write_file"]

_TORCH_SAVE = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How zip archives and pickles begin; so do the lengths of some safetensors headers."""


def write_file(path: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes beside the target and renames, so that a file of this name is always a whole one, old or new.

    Raises:
        FileError: the file cannot be written; what was there is as it was.
    """
    with replacing(path) as partial:
        save_file(dict(tensors), partial, dict(metadata))


def read_file(path: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors (on the CPU; they may be mapped from the file) of a safetensors file.

    Raises:
        FileError: missing, not readable, or no safetensors file.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise FileError(f"it is {'a directory' if stat.S_ISDIR(mode) else 'no regular file'}")
        with open(path, "rb") as file:
            begin = file.read(8)
    except (OSError, ValueError) as error:
        raise FileError(f"{path!r} cannot be read: {error}") from error
    if len(begin) < 8:
        raise FileError(f"{path!r} cannot be read: it is {'empty' if not begin else 'cut off'}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:  # whatever the parser says
        if begin.startswith(_TORCH_SAVE):
            raise FileError(
                f"{path!r} looks like a file of torch.save (zip or pickle), which can run code: not opened"
            ) from error
        raise FileError(f"{path!r} is no safetensors file, or damaged: {error}") from error
    return metadata, tensors
