"""The contract of a pass: ``requires`` / ``run`` / ``ensures``, and what its base checks."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.errors import PassError
from stp_fx.ir.inference_mode import normal_mode
from stp_fx.ir.provenance import needs_whole_tensors, provenance_of
from stp_fx.ir.unchanged import Unchanged
from stp_fx.ir.verify import verify
from stp_fx.passes.artifacts import Artifacts, Outcome, outcome_of
from stp_fx.registry import Registry

__all__ = ["GraphPass", "known_passes"]

_PASSES: Registry[type[GraphPass]] = Registry("pass")


def known_passes() -> dict[str, type[GraphPass]]:
    """Passes by the name of their class, as a textual pipeline writes them."""
    return {str(name): each for name, each in _PASSES.items().items()}


@dataclasses.dataclass(frozen=True)
class GraphPass:
    """Base of all passes: a frozen dataclass whose fields are its printable arguments.

    A pass overrides :meth:`call`, which gets a graph, or :meth:`run`, which also gets and returns the :class:`Artifacts` of the
    pipeline. Calling a pass runs it alone; a :class:`Pipeline` hands artifacts on. The base checks every pass:

    - ``kind`` "analysis" returns the graph that it was given, "rewrite" a new one (or the given one, unmodified);
    - the given graph is as it was: parameters, buffers, nodes, modes, ``meta``;
    - a rewritten graph is well formed and runs on its recorded example (:func:`stp_fx.ir.verify`).

    Torch's ``PassManager`` accepts passes that rewrite, and pipelines as a whole: it hands no artifacts on.
    """

    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"
    repairs: ClassVar[bool] = False
    """Whether a rewrite keeps the structure and only repairs weights, so that measurements, scores and the plan stay valid."""

    def __init_subclass__(cls, *, abstract: bool = False, **options: Any) -> None:
        """Registers the pass by its name, unless it is private, local, or only a base of others (``abstract=True``)."""
        super().__init_subclass__(**options)
        if not abstract and not cls.__name__.startswith("_") and "<locals>" not in cls.__qualname__:
            _PASSES.add(cls.__name__, cls, owner=cls.__module__)

    def __str__(self) -> str:
        """The pass as the call that makes it: its fields that are printed and not at their defaults."""
        parts: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.repr and (field.default is dataclasses.MISSING or value != default):
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def requires(self, gm: fx.GraphModule) -> None:
        """Raises if ``gm`` is not what this pass can work on, or an argument does not fit ``gm``; runs nothing."""
        provenance_of(gm)
        needs_whole_tensors(gm)

    def call(self, gm: fx.GraphModule) -> PassResult:
        """The pass without artifacts."""
        raise PassError(f"{type(self).__name__} overrides neither `call` nor `run`: override one of them")

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        """The pass with what earlier passes made; returns what later ones may use."""
        outcome = outcome_of(self.call(gm), f"{type(self).__name__}.call", artifacts)
        if not outcome.modified:
            return outcome
        result = outcome.graph_module
        return Outcome(result, True, artifacts.carried_to(result) if self.repairs else Artifacts())

    def ensures(self, result: Outcome) -> None:
        """Raises if the result is not what this pass promises."""
        if result.modified:
            verify(result.graph_module)

    def __call__(self, gm: fx.GraphModule, artifacts: Artifacts | None = None) -> Outcome:
        return self.apply(gm, artifacts)

    def apply(self, gm: fx.GraphModule, artifacts: Artifacts | None = None) -> Outcome:
        """Checks, runs the pass, and checks what it did.

        Raises:
            StpFxError: what the pass itself raises.
            PassError: the pass broke its contract: it changed the graph that it was given, or returned the wrong kind of graph.
        """
        with normal_mode():
            self.requires(gm)
            return self.checked(gm, artifacts or Artifacts())

    def checked(self, gm: fx.GraphModule, artifacts: Artifacts, before: Unchanged | None = None) -> Outcome:
        """:meth:`apply` for a caller that has called :meth:`requires`; ``before``: the record of ``gm`` that the caller has
        taken already."""
        before = before or Unchanged(gm)
        outcome = self.run(gm, artifacts)
        name = type(self).__name__
        if self.kind == "analysis" and (outcome.modified or outcome.graph_module is not gm):
            raise PassError(
                f"{name} is an analysis and returned another graph; declare kind = 'rewrite', or return the given one"
            )
        if outcome.modified and outcome.graph_module is gm:
            raise PassError(f"{name} returned the given graph as modified; a rewrite returns a new GraphModule")
        difference = before.difference()
        if difference is not None:
            raise PassError(f"{name} changed the graph that it was given: {difference}; change a copy (copy.deepcopy) instead")
        self.ensures(outcome)
        return outcome
