"""Does a captured graph compute what the model computes: both are run, and what they give is compared.

Translation validation in the sense of compilers: no proof that the front ends are right, but a check of each capture. Model and
graph run on the example in the mode that the model is in, in the other mode, with another batch and in another size, each time
from the same random state. Whatever the runs write is put back.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from stp_fx.ir.agreement import Difference, compared
from stp_fx.ir.as_it_was import as_it_was
from stp_fx.ir.compiled import eagerly
from stp_fx.ir.example import itself_fails
from stp_fx.ir.examples import Example, other_sizes, real_example, with_rows
from stp_fx.ir.first_difference import first_difference, module_values, node_values
from stp_fx.ir.meta_run import MetaRun
from stp_fx.ir.modes import has_modes
from stp_fx.ir.nested import mapped
from stp_fx.ir.outputs import kept_outputs
from stp_fx.ir.patches import LOCK, suspended
from stp_fx.ir.random_ops import FixedDraws
from stp_fx.ir.runner import run_graph
from stp_fx.ir.shapes import meta_like, meta_twin
from stp_fx.ir.validation import Budget, Validation

__all__ = ["UNSTEADY", "Run", "run_once", "validate_capture"]

_log = logging.getLogger("stp_fx.validate")
UNSTEADY = "not comparable: the model gives other numbers each time"
_REMOVAL = 3
"""Forward passes for which the checks of a capture leave time to that of a removal: two, and what its copies take."""
_NEARLY = 0.05
"""Differences below this may be rounding that the network has amplified."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of a call: its output, the buffers that it wrote to, or its error; and whether it drew random numbers."""

    output: Any = None
    buffers: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    error: Exception | None = None
    drew: bool = False
    refilled: bool = False
    """Whether a list or dict among the arguments holds something else than before."""
    assigned: tuple[str, ...] = ()
    """Attributes of the module to which the call has assigned."""

    @property
    def no_memory(self) -> bool:
        return isinstance(self.error, (torch.OutOfMemoryError, MemoryError))


def run_once(
    module: nn.Module,
    example: Example,
    budget: Budget,
    *,
    beside: tuple[nn.Module, ...] = (),
    training: bool | None = None,
    fixed: bool = False,
) -> Run:
    """Calls a module for real, and puts back all that the call writes to it and to the modules ``beside`` it.

    Args:
        training: the mode to run in; None: as the module is.
        fixed: dropout and the like keep everything, so that random numbers drawn in another order make no difference.
    """
    copied = example.mapped(torch.Tensor.clone)
    given, before = (copied.args, copied.kwargs), pytree.tree_structure((example.args, example.kwargs))
    start = time.perf_counter()
    with LOCK, as_it_was(module, *beside) as held, _quiet(), FixedDraws() if fixed else ExitStack():
        states = _random_states()
        try:
            if training is not None:
                module.train(training)
            output = mapped(torch.Tensor, lambda t: t.detach().clone(), module(*given[0], **given[1]))
            drew = any(not torch.equal(a, b) for a, b in zip(states, _random_states(), strict=True))
            result = Run(output, held.changed(module), drew=drew, refilled=pytree.tree_structure(given) != before)
        except Exception as error:
            result = Run(error=error)
    own = tuple(name.removeprefix("0.") for name in held.assigned if name.startswith("0."))
    result = dataclasses.replace(result, assigned=own)
    budget.count(time.perf_counter() - start)
    return result


def _random_states() -> list[torch.Tensor]:
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else ())]


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is traced, no gradients, no warnings, and no fused attention that computes padding differently.

    Filters of warnings and the choice of attention are the process's, so callers hold :data:`LOCK`.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    with suspended(), torch.no_grad(), eagerly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


ByName = Callable[[tuple[Any, ...], Mapping[str, Any]], Mapping[str, Any]]
"""From positional and named arguments to all of them by the name that the graph's inputs have."""


def validate_capture(
    model: nn.Module, gm: fx.GraphModule, example: Example, by_name: ByName, budget: Budget, *, bound: bool = False
) -> tuple[Validation, tuple[str, ...], str | None]:
    """The comparisons, the attributes to which the model assigns, and the differences in what is guaranteed.

    Guaranteed are the mode that the model is in, any batch, any size.

    Args:
        bound: the graph is known to hold for the example's own batch alone.

    Raises:
        InputError: the model itself fails on the example, in both modes.
    """
    real = real_example(model, example)
    if isinstance(real, str):
        return Validation(left_out={"all": real}, seconds=budget.seconds), (), None
    checker = _Checker(model, gm, by_name, budget)
    difference = checker.all(real, bound)
    if len(checker.failed) == 2:  # one mode alone may want more rows, as batch norm does
        failed = checker.failed[0]
        raise itself_fails(model, by_name(real.args, real.kwargs), failed) from failed
    found = Validation(checker.differences, checker.differs, checker.left_out, budget.seconds, budget.forwards, budget.slowest)
    return found, tuple(checker.assigned), difference


class _Checker:
    """One model and its graph; collects what the checks find."""

    def __init__(self, model: nn.Module, gm: fx.GraphModule, by_name: ByName, budget: Budget) -> None:
        self._model, self._gm, self._by_name, self._budget = model, gm, by_name, budget
        self._largest = 0
        """Numbers in the largest example so far."""
        self._shared = {name for name, _ in model.named_buffers()} & {name for name, _ in gm.named_buffers()}
        self.assigned: dict[str, None] = {}
        self.differences: dict[str, float] = {}
        self.differs: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.failed: list[BaseException] = []
        """The errors that the model itself raised on the example, by mode."""

    def all(self, example: Example, bound: bool) -> str | None:
        """Every check, the most important first; the first difference in what is guaranteed."""
        given, other = ("train", "eval") if self._model.training else ("eval", "train")
        found = self._check(given, example)
        if self.failed:
            self._check(other, example, other == "train")
        if found is not None or given not in self.differences:
            return found
        if has_modes(self._gm.graph):
            self._other_mode(example, other, several=not bound)
            return self._size_and_batch(example, bound)
        found = self._batch(example, bound)
        if found is not None:
            return found
        self._other_mode(example, other, several=any(name.startswith("batch") for name in self.differences))
        return self._size(example)

    def _size_and_batch(self, example: Example, bound: bool) -> str | None:
        """Both in one run, where both are free: the removal of a graph of two modes takes two runs more."""
        before = len(self.differences)
        rows = _rows(example)
        found = None if bound or rows is None else self._size(example, _another(rows))
        if found is not None or len(self.differences) > before:
            return found
        return self._batch(example, bound) or (self._size(example) if bound or rows is None else None)

    def _batch(self, example: Example, bound: bool) -> str | None:
        rows = _rows(example)
        if rows is None:
            self.left_out["another batch"] = "the inputs share no leading dimension"
            return None
        number = _another(rows)
        if bound:
            self.left_out[f"batch {number}"] = "the graph is bound to the example's batch"
            return None
        return self._check(f"batch {number}", with_rows(example, number))

    def _other_mode(self, example: Example, mode: str, *, several: bool) -> None:
        """The mode that the model is not in: a difference is recorded. A batch norm may need ``several`` rows to train, if the
        batch is free."""
        training = mode == "train"
        if training and _distributed() and any(isinstance(m, nn.SyncBatchNorm) for m in self._model.modules()):
            self.left_out[mode] = "SyncBatchNorm would wait for the other processes"
            return
        single = training and all(t.dim() and t.shape[0] == 1 for t in example.tensors)
        found = self._check(mode, with_rows(example, 3) if single and several else example, training)
        if found is not None:
            self.differs[mode] = found.removeprefix(f"{mode}: ")

    def _size(self, example: Example, batch: int | None = None) -> str | None:
        for name, sized in other_sizes(example):
            if batch is not None:
                name, sized = f"{name}, batch {batch}", with_rows(sized, batch)
            if self._takes(sized):
                return self._check(name, sized)
            self.left_out[name] = "the graph does not take it"
        return None

    def _takes(self, example: Example) -> bool:
        """Whether the graph runs on meta tensors of these shapes."""
        inputs = mapped(torch.Tensor, meta_like, self._inputs(example).args)
        try:
            with suspended(), torch.no_grad(), MetaRun():
                run_graph(self._gm.graph, meta_twin(self._gm), inputs)
        except Exception as error:
            _log.debug("another size: %s", error)
            return False
        return True

    def _inputs(self, example: Example) -> Example:
        """The arguments of the model that the graph takes."""
        arguments = self._by_name(example.args, example.kwargs)
        return Example(tuple(arguments[str(n.target)] for n in self._gm.graph.nodes if n.op == "placeholder"), {})

    def _run(self, model: bool, example: Example, training: bool | None, fixed: bool = False) -> Run:
        one, other = (self._model, self._gm) if model else (self._gm, self._model)
        given = example if model else self._inputs(example)
        run = run_once(one, given, self._budget, beside=(other,), training=training, fixed=fixed)
        if model:
            run = dataclasses.replace(run, output=None if run.error else kept_outputs(run.output))
            self.assigned.update(dict.fromkeys(name for name in run.assigned if name not in self._shared))
        return run

    def _check(self, name: str, example: Example, training: bool | None = None) -> str | None:
        """Runs both; records what there is to record, and returns what differs, which it leaves to the caller to record."""
        numbers = sum(t.numel() for t in example.tensors)
        self._largest = self._largest or numbers
        first = not self.differences
        refused = self._budget.refuses(2, size=max(1.0, numbers / max(self._largest, 1)), kept=0 if first else _REMOVAL)
        if refused is not None:
            self.left_out[name] = refused
            return None
        self._largest = max(self._largest, numbers)
        expected = self._run(True, example, training)
        refused = None if expected.error else self._budget.refuses(1)
        if refused is not None or expected.error is not None:
            self.left_out[name] = refused or f"the model does not run: {_told(expected.error)}"
            if expected.error is not None and not expected.no_memory and name in ("eval", "train"):
                self.failed.append(expected.error)
            return None
        actual = self._run(False, example, training)
        if actual.error is not None:
            return self._failed(name, actual)
        found = self._compared(expected, actual)
        if found.text is None:
            self.differences[name] = found.largest
            return None
        return self._examined(name, example, training, expected, found)

    def _failed(self, name: str, run: Run) -> str | None:
        """The meaning of an error that a graph raises: its own assertions say which sizes it takes."""
        declared = isinstance(run.error, AssertionError) and name not in ("eval", "train")
        if declared or run.no_memory or name.startswith(("size", "length")):
            self.left_out[name] = f"the graph does not take it: {_told(run.error)}"
            return None
        return f"{name}: the graph raises {_told(run.error)}, the model does not"

    def _examined(self, name: str, example: Example, training: bool | None, expected: Run, found: Difference) -> str | None:
        """A difference that the model has with itself, or that random numbers drawn in another order make, is none."""
        self._budget.allow(4)
        again = self._run(True, example, training)
        if again.error is not None or self._compared(expected, again).text is not None:
            self.left_out[name] = UNSTEADY
            return None
        fixed = [self._run(side, example, training, fixed=True) for side in (True, False)]
        alike = Difference(1.0, "") if fixed[0].error or fixed[1].error else self._compared(fixed[0], fixed[1])
        if alike.text is None:
            self.differences[name] = alike.largest
            return None
        if found.largest < _NEARLY and self._chaotic(example, training, expected, found):
            self.left_out[name] = "not comparable: rounding alone changes the model's output as much"
            return None
        return f"{name}: {found.text}{self._first(example, training)}"

    def _first(self, example: Example, training: bool | None) -> str:
        """Where the two begin to differ, in words; empty if no module that both call tells."""
        called = {str(n.target) for n in self._gm.graph.nodes if n.op == "call_module"}
        inputs = self._inputs(example).mapped(torch.Tensor.clone).args
        try:
            with LOCK, as_it_was(self._model, self._gm), _quiet(), FixedDraws():
                if training is not None:
                    self._model.train(training)
                given = example.mapped(torch.Tensor.clone)
                theirs = module_values(self._model, called, lambda: self._model(*given.args, **given.kwargs))
            with LOCK, as_it_was(self._model, self._gm), _quiet(), FixedDraws():
                if training is not None:
                    self._gm.train(training)
                ours = node_values(self._gm, inputs)
        except Exception as error:
            _log.debug("no node by node comparison: %s", error)
            return ""
        return first_difference(self._gm, theirs, ours)

    def _chaotic(self, example: Example, training: bool | None, expected: Run, found: Difference) -> bool:
        """Whether the model answers as much to inputs that differ in the last bits."""
        moved = example.mapped(lambda t: t * (1 + 4 * torch.finfo(t.dtype).eps) if t.is_floating_point() else t)
        answer = self._run(True, moved, training)
        return answer.error is None and 10 * self._compared(expected, answer).largest >= found.largest

    def _compared(self, expected: Run, actual: Run) -> Difference:
        found = compared(expected.output, actual.output)
        if expected.refilled != actual.refilled:
            writer, idle = ("model", "graph") if expected.refilled else ("graph", "model")
            found = found.then(Difference(1.0, f"the {writer} changes a list or dict among its arguments, the {idle} does not"))
        for name in ({*expected.buffers} | {*actual.buffers}) & self._shared:
            one, other = expected.buffers.get(name), actual.buffers.get(name)
            if one is not None and other is not None:
                found = found.then(compared(one, other, f"buffer '{name}'"))
            else:
                writer, idle = ("model", "graph") if other is None else ("graph", "model")
                found = found.then(Difference(1.0, f"the {writer} updates buffer '{name}', the {idle} does not"))
        return found


def _rows(example: Example) -> int | None:
    """The batch: the leading dimension, if the inputs share one."""
    rows = {int(t.shape[0]) if t.dim() and t.layout is torch.strided else 0 for t in example.tensors}
    return next(iter(rows)) if len(rows) == 1 and rows != {0} else None


def _another(rows: int) -> int:
    return 3 if rows <= 2 else 2


def _distributed() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _told(error: Exception | None) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {first[:160]}" if first else type(error).__name__
