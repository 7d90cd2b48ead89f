"""Sizes that Python asks for as whole numbers (``__index__``), until it is known what for.

PyTorch's argument parser asks every size whether it is a whole number, and then hands the call over with the sizes themselves:
the graph holds for any size. Whoever else asks (``range``, the repetition of a list) has used the number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import fx

from stp_fx.ir.nested import leaves_of

__all__ = ["AskedIndices"]


class AskedIndices:
    """``use`` hears of each size that became a number, before the next node of the graph is made."""

    def __init__(self, use: Callable[[fx.Node], None]) -> None:
        self._use = use
        self._asked: list[tuple[FrameType, int, fx.Node]] = []

    def ask(self, node: fx.Node) -> None:
        frame = sys._getframe(2)  # of whoever has called ``__index__``, from C
        self._asked.append((frame, frame.f_lasti, node))

    def settle(self, *given: Any) -> None:
        """A node is about to be made of ``given``: what the very call of it has asked for is not used.

        It is the same call if a frame that asked still is at the same instruction.
        """
        if not self._asked:
            return
        asked, self._asked = self._asked, []
        taken = {proxy.node for proxy in leaves_of(fx.Proxy, given)}
        running: set[tuple[int, int]] = set()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            running.add((id(frame), frame.f_lasti))
            frame = frame.f_back
        for asker, instruction, node in asked:
            if node not in taken or (id(asker), instruction) not in running:
                self._use(node)
