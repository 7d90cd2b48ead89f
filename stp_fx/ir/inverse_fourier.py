"""``torch.istft`` in ops that run for their shapes: its own code looks at numbers of the window."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from stp_fx.ir.active import active
from stp_fx.ir.proxies import holds_proxy

__all__ = ["istft"]


@functools.wraps(torch.istft)
def istft(input: Any, *args: Any, **kwargs: Any) -> Any:
    if active() is None or not holds_proxy((input, kwargs.get("window"))):
        return _ORIGINAL(input, *args, **kwargs)
    return _inverse(input, *args, **kwargs)


_ORIGINAL = torch.istft


def _inverse(
    input: Any,
    n_fft: Any,
    hop_length: Any = None,
    win_length: Any = None,
    window: Any = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: Any = None,
    return_complex: bool = False,
) -> Any:
    """Frames are transformed back, weighted by the window, added where they overlap, and divided by the sum of its squares.

    ``onesided`` changes nothing: the shape of the input says it.
    """
    hop, width = hop_length or n_fft // 4, win_length or n_fft
    x = input if input.dim() == 3 else input.unsqueeze(0)
    norm = "ortho" if normalized else "backward"
    x = x.transpose(1, 2)
    real = x[..., : n_fft // 2 + 1]  # torch's own reads the first half alone, also of a spectrum with both sides
    frames = torch.fft.ifft(x, n_fft, norm=norm) if return_complex else torch.fft.irfft(real, n_fft, norm=norm)
    if window is None:
        window = torch.ones(width, dtype=frames.dtype, device=frames.device)
    left = (n_fft - width) // 2
    window = F.pad(window, (left, n_fft - width - left))
    total = n_fft + hop * (frames.size(1) - 1)
    summed = _overlapped((frames * window).transpose(1, 2), n_fft, hop, total)
    weights = _overlapped(window.square()[None, :, None].expand(1, n_fft, frames.size(1)), n_fft, hop, total)
    start = n_fft // 2 if center else 0
    end = start + length if length is not None else total - start
    result = summed[:, start:end] / weights[:, start:end]
    if length is not None:
        result = F.pad(result, (0, length - result.size(1)))
    return result if input.dim() == 3 else result.squeeze(0)


def _overlapped(frames: Any, width: Any, hop: Any, total: Any) -> Any:
    """[batch, width, frames] to [batch, total]."""
    return F.fold(frames, (1, total), kernel_size=(1, width), stride=(1, hop)).flatten(1)
