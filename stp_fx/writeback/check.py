"""Does a module compute what a graph does? In several sizes, with the real weights and with weights that leave no doubt."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from stp_fx.errors import InputError, WriteBackError
from stp_fx.ir.as_it_was import as_it_was
from stp_fx.ir.modes import has_modes
from stp_fx.ir.outputs import kept_outputs, only_outputs
from stp_fx.ir.provenance import provenance_of
from stp_fx.ir.random_ops import FixedDraws
from stp_fx.rewrite.slicing import copied
from stp_fx.writeback.calls import Arguments, call_graph, call_original, difference, drawn, leaves, mapped, other_shapes
from stp_fx.writeback.locate import first_difference, kept_scales, literals_before
from stp_fx.writeback.obstacles import Failure, failure_of
from stp_fx.writeback.sizes import Sizes

__all__ = ["Check", "agree_in_double", "evaluating", "stress"]

_log = logging.getLogger(__name__)


class Check:
    """The outputs of a graph for the arguments, and for others like them in other sizes that it takes.

    Args:
        given, pattern: the arguments as they were given, and on the meta device.
        dtype: the precision whose rounding a difference has to exceed; None: that of the outputs.

    Raises:
        WriteBackError: the graph gives no finite number for the arguments, so nothing can be held against it.
    """

    def __init__(self, gm: fx.GraphModule, given: Arguments, pattern: Arguments, dtype: torch.dtype | None = None) -> None:
        device = next((t.device for t in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))
        self._gm, self._dtype = gm, dtype
        call = provenance_of(gm).call
        self._outputs = () if call is None else call.outputs
        self._expected: list[tuple[Arguments, Any]] = []
        with evaluating(gm):
            try:
                outputs = call_graph(gm, drawn(given, device, seed=0))
            except Exception as error:
                raise InputError(
                    f"`pruned` does not run on `example_inputs`: {error}; give what the model was traced with"
                ) from error
            if not any(bool(t.isfinite().any()) for t in leaves(outputs).values()):
                raise WriteBackError(
                    "the pruned graph gives no finite number for the example, so nothing can be checked: give `example_inputs`"
                )
            self._expected.append((drawn(given, device, seed=0), outputs))
            for seed, other in enumerate(other_shapes(pattern), 1):
                arguments = drawn(other, device, seed)
                try:
                    self._expected.append((arguments, call_graph(gm, arguments)))
                except Exception as error:
                    _log.debug("sizes that the graph does not take: %s", error)
        self._trained = self._in_training(gm, self._expected[0][0]) if has_modes(gm.graph) else None

    @property
    def arguments(self) -> Arguments:
        """Those of the example."""
        return self._expected[0][0]

    @property
    def sizes(self) -> int:
        """In how many sizes a module is held against the graph."""
        return len(self._expected)

    def __call__(self, model: nn.Module) -> Failure | None:
        """``None`` if the module gives the same in all of them."""
        with evaluating(model):
            for arguments, expected in self._expected:
                try:
                    found = self._outputs_of(model, arguments)
                except Exception as error:
                    return failure_of(error, model)
                differs = difference(expected, found, self._dtype)
                if differs:
                    return Failure(f"its {differs}")
        if self._trained is not None:
            found = self._in_training(model, self._expected[0][0])
            differs = "it does not run" if found is None else difference(self._trained, found, self._dtype)
            if differs:
                return Failure(f"in training, {differs}")
        return None

    def _outputs_of(self, model: nn.Module, arguments: Arguments) -> Any:
        """Those that the graph was asked for."""
        with only_outputs(self._outputs):
            return kept_outputs(call_original(model, arguments))

    def _in_training(self, module: nn.Module, arguments: Arguments) -> Any:
        """The output of a module in training when dropout keeps everything; None if it does not run."""
        with torch.no_grad(), as_it_was(module), FixedDraws():
            module.train()
            try:
                if isinstance(module, fx.GraphModule):
                    return call_graph(module, arguments)
                return self._outputs_of(module, arguments)
            except Exception as error:
                _log.debug("no run in training: %s", error)
                return None

    def explained(self, model: nn.Module, failure: Failure, sizes: Sizes) -> Failure:
        """Adds what the graph says: from where on outputs differ, and the numbers that it has in their place."""
        if failure.module is not None:
            return dataclasses.replace(failure, constants=tuple(literals_before(self._gm, failure.module)))
        with evaluating(model), evaluating(self._gm):
            module = first_difference(self._gm, model, self._expected[0][0])
        return dataclasses.replace(failure, module=module, constants=tuple(kept_scales(self._gm, sizes)))


def agree_in_double(gm: fx.GraphModule, model: nn.Module, given: Arguments, pattern: Arguments) -> bool:
    """Whether a graph and a module of a lower precision give the same once both compute in double precision.

    Scores that differ by rounding alone come in either order (``topk``, ``argmax``), and then choose different things. Double
    precision tells all but equal scores apart. Outputs may differ by the rounding of the module's own precision, since tensors
    that it keeps outside its buffers still have it. False as well if one of the two does not run in double precision.
    """
    own = next((t.dtype for t in (*gm.parameters(), *gm.buffers()) if t.is_floating_point()), torch.float64)
    if own == torch.float64:
        return False

    def widened(arguments: Arguments) -> Arguments:
        return {k: mapped(v, lambda t: t.double() if t.is_floating_point() else t) for k, v in arguments.items()}

    try:
        graph, twin = copied(gm).double(), copied(model).double()
        failure = Check(graph, widened(given), widened(pattern), own)(twin)
    except Exception as error:
        _log.debug("not comparable in double precision: %s", error)
        return False
    if failure is not None:
        _log.debug("in double precision, %s", failure.text)
    return failure is None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients; afterwards each module has its own flag again, and torch its random state."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module.eval()
            yield
    finally:
        for m, flag in flags:
            m.training = flag


def stress(gm: fx.GraphModule, model: nn.Module) -> None:
    """Draws the same weights for both, with entries of variance 1 / fan-in.

    Small weights hide a wrong constant: attention at its initial weights is almost uniform, whatever its scale.
    """
    generator = torch.Generator().manual_seed(0)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if not parameter.is_floating_point() or name not in wanted:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
            fan = max(1, parameter.numel() // max(1, parameter.shape[0])) if parameter.dim() > 1 else 0
            value = noise / fan**0.5 if fan else parameter + 0.1 * noise
            parameter.copy_(value)
            wanted[name].copy_(value)
