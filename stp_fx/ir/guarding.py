"""A tracer that hears of every number that Python asks a proxy for: what is known, what is asserted, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from stp_fx.errors import TraceError
from stp_fx.ir.base_tracer import BaseTracer
from stp_fx.ir.batch import NumbersOfBatch, compares_shapes, first_tensor
from stp_fx.ir.branches import of_device, of_selection, sizes_of
from stp_fx.ir.indices import AskedIndices
from stp_fx.ir.known_values import Known, buffers_read, known_value
from stp_fx.ir.proxies import user_line

__all__ = ["LEAF", "OWN", "GuardingTracer"]

LEAF = "_stp_fx_call_"
OWN = ("_tensor_constant", LEAF)
"""Attributes that tracing itself puts on the model, until the graph is made: see :meth:`ModuleTracer.forget_constants`."""


class GuardingTracer(BaseTracer):
    """Sizes become numbers with an assertion; the batch becomes none.

    ``given``: whole numbers among the example, by input; ``read``: those that were read.
    ``written``, ``assigned``: what the forward has written to so far.
    """

    def __init__(self, batch: int) -> None:
        super().__init__(param_shapes_constant=False)
        self.given: Mapping[str, torch.Tensor] = {}
        self.read: set[str] = set()
        self.assigned: list[str] = []
        self.written: set[str] = set()
        self.remarks: dict[str, None] = {}
        self.selects = False
        self.branches_on_batch = False
        self.bakes_batch = False
        self.finished = False
        self.batch = NumbersOfBatch(batch)
        self.asked = AskedIndices(lambda node: self.guard(node, node.meta["val"], truth=False, counted=True))

    def remark(self, what: str) -> None:
        """Notes something that the forward does and the graph does not."""
        self.remarks[f"the forward {what} (at {user_line()})"] = None

    def known(self, node: fx.Node, example: bool = False) -> torch.Tensor | None:
        """The numbers of a tensor that follow from buffers and sizes, and, with ``example``, from whole numbers among the inputs.

        Notes say that the graph keeps them as they are now; of inputs it asserts it. Where code branches on whether data are
        finite (to clamp overflows), they are, and the graph asserts that too.
        """
        written = {*self.written, *self.assigned}
        known = Known(self.root, written, self.given if example else {}, finite=not example)  # type: ignore[arg-type]
        value = known_value(known, node)
        if value is None or any(map(self.batch.made, known.sizes)):
            return None
        for size in known.sizes:
            self.guard(size, size.meta["val"], truth=False)
        if not known.assumed and (named := buffers_read(node, OWN)):
            self.remark(f"reads numbers of {', '.join(map(repr, named))}, which the graph keeps as they are now")
        if known.assumed:
            self._assert_data(node, value, f"not all numbers are finite at {user_line()}, and the graph holds if they are")
        if known.read:
            names = ", ".join(map(repr, dict.fromkeys(known.read)))
            self.read.update(known.read)
            said = f"the graph holds for the numbers that the forward reads of {names} (at {user_line()}), which it asserts"
            self.remarks[said] = None
            text = f"the graph holds for inputs that give {value.tolist()} at {user_line()}, as its example does: trace again"
            self._assert_data(node, value, text)
        return value

    def _assert_data(self, node: fx.Node, value: torch.Tensor, text: str) -> None:
        same: Any = self.proxy(node) == value.tolist()
        self.create_proxy("call_function", torch._assert_async, (same.all(), text), {})

    def guard(self, node: fx.Node, value: Any, *, truth: bool, counted: bool = False) -> None:
        """Python is about to use a size: the graph holds for inputs that give the same answer, and says so if one does not.

        ``counted``: as the length of a loop or a list, of which the graph keeps the steps and not the number.
        """
        if not isinstance(value, (bool, int, float)) or self.finished or isinstance(node.meta["val"], torch.Tensor):
            return
        if self.selects and of_selection(node):
            raise TraceError(
                f"asks how many positions data select, at {user_line()}: a graph does the same whatever they are. Go through all "
                "experts or classes, without a branch for those that nothing selects: they add nothing"
            )
        if of_device(node):
            return  # both ways compute the same, and a graph is run on other devices, for shapes on meta
        if self.batch.made(node):
            if not truth and not counted:
                self.bakes_batch = True  # it is made of the input again later, if a trace with another batch says how
                for size in sizes_of(node):
                    self._fix(size)
            elif not (truth and self.batch.compares(node)):
                self.branches_on_batch = True
            if not (truth and compares_shapes(node)):
                return
        if not truth:
            self._assert(self.proxy(node) == value)
        else:
            # Not ``not``: the code of a pickled graph is traced again, and there ``not`` would ask a proxy for its truth.
            self._assert(self.proxy(node) if value else self.proxy(node) == False)  # noqa: E712

    def _assert(self, holds: Any) -> None:
        message = f"traced for another shape: the branch at {user_line()} differs; trace again with an example of this shape"
        self.create_proxy("call_function", torch._assert, (holds, message), {})

    def _fix(self, size: fx.Node) -> None:
        """A size that goes into a number beside the batch, or that has the batch in it, is what it was, whatever the batch is."""
        value = size.meta["val"]
        if not self.batch.multiple(value):
            self._assert(self.proxy(size) == value)
        elif value != self.batch.size:
            self._assert(self.proxy(size) == self.proxy(first_tensor(self.graph)).size(0) * (value // self.batch.size))
