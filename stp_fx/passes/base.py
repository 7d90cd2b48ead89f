"""The contract of a pass: ``requires`` / ``call`` / ``ensures``, and pipelines that are passes themselves."""

from __future__ import annotations

import dataclasses

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from stp_fx.errors import PassError, StpFxError
from stp_fx.ir.provenance import needs_whole_tensors, provenance_of

__all__ = ["GraphPass", "Pipeline"]


@dataclasses.dataclass(frozen=True)
class GraphPass:
    """Base of all passes: a frozen dataclass whose fields are its printable arguments.

    Calling a pass checks ``requires``, runs ``call`` and checks ``ensures`` on the *result*. It returns torch's
    ``PassResult``, so a pass also runs inside ``torch.fx.passes.infra.pass_manager.PassManager``. A pass that rewrites
    returns a new GraphModule and leaves its input as it was.
    """

    def requires(self, gm: fx.GraphModule) -> None:
        """Raises if ``gm`` is not what this pass can work on."""
        provenance_of(gm)
        needs_whole_tensors(gm)

    def call(self, gm: fx.GraphModule) -> PassResult:
        raise NotImplementedError(f"{type(self).__name__} does not say what it does")

    def ensures(self, result: PassResult) -> None:
        """Raises if the result is not what this pass promises."""

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        self.requires(gm)
        result = self.call(gm)
        self.ensures(result)
        return result


@dataclasses.dataclass(frozen=True, init=False)
class Pipeline(GraphPass):
    """Passes one after another; a pass itself, so pipelines nest.

    >>> print(Pipeline())
    Pipeline()
    """

    passes: tuple[GraphPass, ...]

    def __init__(self, *passes: GraphPass) -> None:
        object.__setattr__(self, "passes", tuple(passes))

    def requires(self, gm: fx.GraphModule) -> None:
        """Each pass checks what it is given."""

    def call(self, gm: fx.GraphModule) -> PassResult:
        modified = False
        for position, each in enumerate(self.passes):
            try:
                result = each(gm)
            except StpFxError as error:
                before = ", ".join(type(p).__name__ for p in self.passes[:position]) or "none"
                note = f"in pass {position + 1} of {len(self.passes)}, {each!r}; passes before it: {before}"
                if not isinstance(error, PassError):
                    error.add_note(note)
                raise
            except Exception as error:
                before = ", ".join(type(p).__name__ for p in self.passes[:position]) or "none"
                raise PassError(f"{each!r} failed: {error}; passes before it: {before}") from error
            gm, modified = result.graph_module, modified or result.modified
        return PassResult(gm, modified)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(map(repr, self.passes))})"
