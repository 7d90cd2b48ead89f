"""Where one rule is applied to one sample of its entry, outside of any graph."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from stp_fx.analysis.propagate import _Propagation
from stp_fx.analysis.solve import solve
from stp_fx.ir._torch_compat import meta_kernels
from stp_fx.ir.meta_run import run_for_shape
from stp_fx.rules import FIXED, Dim, Dims, OpCall, entries, registered, tensors_in
from stp_fx.rules.literals import Policy
from stp_fx.rules.registry import Rule, overload_of
from stp_fx.rules.samples import Sample


def samples() -> list[tuple[str, str, Sample]]:
    """(op, label, sample) of all entries of ATen ops, sorted by op."""
    found = [(op, label, sample) for entry in entries() for op in entry.ops for label, sample in entry.samples.items()]
    return sorted((each for each in found if each[0].startswith("aten.")), key=lambda each: f"{each[0]}#{each[1]}".rstrip("#"))


class Bench:
    """A rule's view of one call: axes are named a, b, c ... in the order in which tensors are made."""

    device = torch.device("meta")

    def __init__(self) -> None:
        self.run = _Propagation(fx.symbolic_trace(nn.Identity()), nn.Identity())
        self.run._policy = Policy.EDITABLE
        self.run.elements.node = "op"
        self.axes: list[tuple[str, np.ndarray]] = []
        self.made: list[Dims] = []

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, below: int = 2) -> torch.Tensor:
        """A tensor whose every dimension has an axis of its own."""
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        dims = []
        for size in shape:
            dim = self.run.elements.new_dim(size)
            if dim:
                self.axes.append((string.ascii_letters[len(self.axes)], dim[0].ids))
            dims.append(dim)
        self.run.assign(tensor, tuple(dims))
        self.made.append(tuple(dims))
        return tensor

    def index(self, *shape: int, below: int) -> torch.Tensor:
        """A tensor of positions, without axes."""
        return torch.empty(shape, dtype=torch.int64, device="meta")

    def apply(self, op: str, values: Any, named: Any, rule: Rule) -> Any:
        """Runs the op on meta tensors, and a rule on the call; returns the results."""
        func = overload_of(op)
        self.run.mask(values, named)
        outs = run_for_shape(func, tuple(values), dict(named)) if func in meta_kernels() else func(*values, **named)
        rule(OpCall(self.run, func, values, named, outs))
        return outs

    def line(self, op: str, label: str, sample: Sample) -> str:
        """What the rule states of a sample, as text."""
        values, named = sample(self)
        before = ", ".join(self._tensor(t) for t in tensors_in(values)) or "nothing"
        outs = self.apply(op, values, named, registered()[op])
        after = ", ".join(self._tensor(t) for t in tensors_in(outs)) or "nothing"
        return f"{op}{'#' * bool(label)}{label}: {before} -> {after}{self._said()}"

    def _name(self, ids: np.ndarray) -> str:
        for letter, axis in self.axes:
            at = np.flatnonzero(np.isin(axis, ids))
            if len(at) == len(ids) and np.isin(ids, axis).all():
                if np.array_equal(axis, ids):
                    return letter
                order = (ids - axis[0]).tolist()
                if order == list(range(order[0], order[0] + len(order))):
                    return f"{letter}[{order[0]}:{order[-1] + 1}]"
                return f"{letter}{order}".replace(" ", "")
        parts = [f"{letter}[{int((i - axis)[0])}]" for i in ids for letter, axis in self.axes if i in axis]
        if len(parts) + int((ids == FIXED).sum()) == len(ids) and len(parts):
            return "{" + "+".join(parts) + "}"
        self.axes.append((string.ascii_letters[len(self.axes)] + "'", ids))
        return self.axes[-1][0]

    def _dim(self, dim: Dim) -> str:
        if not dim:
            return "1"
        parts = [str(f.size) if f.ids is None else self._name(f.ids) for f in dim]
        return parts[0] if len(parts) == 1 else f"({' '.join(parts)})"

    def _tensor(self, tensor: torch.Tensor) -> str:
        return "[" + " ".join(self._dim(dim) for dim in self.run.dims(tensor)) + "]"

    def _said(self) -> str:
        elements = self.run.elements
        said = sorted({f"{self._name(a)}~{self._name(b)}" for a, b in elements.unions if a.ndim == 1 and len(a)})
        said += sorted({f"{self._name(p.ids.ravel())}={'x'.join(self._name(f) for f in p.factors)}" for p in elements.products})
        said += sorted({f"pin {self._name(n.ids)}" for n in elements.pins if n.node})
        said += sorted({f"inexact {self._name(n.ids)}" for n in elements.notes})
        said += [
            f"{f'chooses {e.least}' if e.least else 'weighs'} {self._name(e.ids)}, not {e.value:g}" for e in elements.exclusions
        ]
        for entry in self.run.result.contractions:
            letters = " ".join(self._dim(d) for d in entry.letters)
            said.append(f"{entry.multiplier} x ({letters}) over {' '.join(self._dim(d) for d in entry.contracted)}")
        solve(elements)
        return "".join(f"; {each}" for each in said)
