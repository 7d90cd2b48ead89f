"""``Pipeline``: passes one after another, as one pass that can be printed and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import fx

from stp_fx.checks import shown
from stp_fx.errors import InputError, PassError, StpFxError
from stp_fx.ir.unchanged import Unchanged
from stp_fx.passes.artifacts import Artifacts, Outcome, outcome_of
from stp_fx.passes.base import GraphPass
from stp_fx.passes.text import parse_pipeline
from stp_fx.text import ROWS, html_table

__all__ = ["Pipeline"]


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Pipeline(GraphPass):
    """Passes one after another, each given the artifacts of those before it; a pass itself, so pipelines nest.

    A member is a :class:`GraphPass` or any callable that takes a GraphModule and returns torch's ``PassResult``. The requirements
    of the passes up to the first rewrite are checked before any of them runs.

    >>> print(Pipeline())
    Pipeline()
    """

    passes: tuple[GraphPass | Callable[[fx.GraphModule], Any], ...]

    def __init__(self, *passes: GraphPass | Callable[[fx.GraphModule], Any]) -> None:
        for each in passes:
            if isinstance(each, type) or not callable(each):
                raise InputError(f"a Pipeline is made of passes; got {_described(each)}")
        object.__setattr__(self, "passes", tuple(passes))

    @classmethod
    def parse(cls, text: str, **arguments: Any) -> Pipeline:
        """Reads what ``str(pipeline)`` gives: ``"Pipeline(ScoreUnits('variance'), SelectUnits(0.5), RemoveChannels())"``.

        Args:
            text: names of passes and criteria with literal arguments; nothing in it is run.
            arguments: what text cannot hold, by the name of a field: ``calibration=loader``, ``loss=function``. Each is given to
                every pass that has such a field.

        Raises:
            InputError: an unknown pass, an argument that the pass does not take, or text that is not a pipeline; quotes the
                place.
        """
        return cls(*parse_pipeline(text, arguments))

    def requires(self, gm: fx.GraphModule) -> None:
        """The requirements of the passes up to the first rewrite; later passes see another graph."""
        for each in self.passes:
            if not isinstance(each, GraphPass):
                return
            each.requires(gm)
            if _rewrites(each):
                return

    def checked(self, gm: fx.GraphModule, artifacts: Artifacts, before: Unchanged | None = None) -> Outcome:
        """Every pass is checked by itself; a graph is recorded once for all passes that return it."""
        record = before
        modified, required = False, True
        for position, each in enumerate(self.passes):
            try:
                if not isinstance(each, GraphPass):
                    outcome = _called(each, gm, artifacts)
                else:
                    if not required:
                        each.requires(gm)
                    record = record if record is not None and record.graph_module is gm else Unchanged(gm)
                    outcome = each.checked(gm, artifacts, record)
            except StpFxError as error:
                self._explain(error, position)
                raise
            except Exception as error:
                raise PassError(f"{self._name(each)} failed: {error}; passes before it: {self._before(position)}") from error
            required = required and not _rewrites(each)
            gm, artifacts, modified = outcome.graph_module, outcome.artifacts, modified or outcome.modified
        return Outcome(gm, modified, artifacts)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        return self.checked(gm, artifacts)

    def ensures(self, result: Outcome) -> None:
        """Every pass has checked its own."""

    def _explain(self, error: StpFxError, position: int) -> None:
        if not isinstance(error, PassError):
            name = self._name(self.passes[position])
            error.add_note(f"in pass {position + 1} of {len(self.passes)}, {name}; passes before it: {self._before(position)}")

    def _before(self, position: int) -> str:
        return ", ".join(type(p).__name__ for p in self.passes[:position]) or "none"

    @staticmethod
    def _name(each: Any) -> str:
        return str(each) if isinstance(each, GraphPass) else getattr(each, "__name__", repr(each))

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(map(self._name, self.passes))})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        rows = [(number, self._name(each)) for number, each in enumerate(self.passes, 1)]
        return html_table("Pipeline", ("", "pass"), rows[:ROWS], len(rows))


def _described(given: object) -> str:
    return f"the class {given.__name__}; give {given.__name__}()" if isinstance(given, type) else shown(given)


def _rewrites(each: Any) -> bool:
    """Whether a member may return another graph."""
    return any(map(_rewrites, each.passes)) if isinstance(each, Pipeline) else getattr(each, "kind", "rewrite") == "rewrite"


def _called(each: Any, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
    outcome = outcome_of(each(gm), repr(each), artifacts)
    return outcome if outcome.graph_module is gm and not outcome.modified else Outcome(outcome.graph_module, outcome.modified)
