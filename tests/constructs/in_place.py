"""Augmented assignments that write through another name or a view."""

from __future__ import annotations

import torch

from .catalogue import maps, rows


def alias(y: torch.Tensor) -> torch.Tensor:
    y = skip = y.clone()
    y += 1
    return y * skip


def view(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    first = y[:, :4]
    first += 1
    return y


def half_of_another(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    first = y[:, :4]
    first += y[:, 4:]
    return y


def flat(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    z = y.flatten(2)
    z *= 3
    return y


def a_row(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    row = y[:, 0]
    row /= 2
    return y


def a_piece(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    first, second = y[:, :4], y[:, 4:]
    first -= second
    return torch.cat([first, y], 1)


def nobody_sees(y: torch.Tensor) -> torch.Tensor:
    z = y * 2
    z += y
    z -= 1
    return z


maps("an alias += 1", alias, "exact")
maps("a view += 1", view, "exact")
maps("a view += another view", half_of_another, "sound")
maps("flatten(2) *= 3", flat, "exact")
maps("the first channel /= 2", a_row, "sound", out=8)
maps("a piece -= another", a_piece, "sound", out=12)
maps("+= that nobody sees", nobody_sees, "exact")
rows("the first token /= 2", a_row, "exact")
