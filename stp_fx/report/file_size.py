"""How large a module's weights are on disk, without writing them."""

from __future__ import annotations

import json

import torch
from torch import nn

__all__ = ["safetensors_bytes"]

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of dtypes; those that are not here (eight-bit floats) have names of about the same length."""


def safetensors_bytes(module: nn.Module) -> int:
    """Bytes of the module's state dict as safetensors writes it: the length of the header, the header (JSON, padded to
    eight bytes) and the data. Tied tensors count once, buffers that are not persistent do not count."""
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            tensors.setdefault(id(value), (name, value))
    header, offset = {}, 0
    # The order of the format: by alignment, then by name. It decides how many digits the offsets have.
    for name, tensor in sorted(tensors.values(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        code = _CODES.get(tensor.dtype, "F8_E4M3")
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset
