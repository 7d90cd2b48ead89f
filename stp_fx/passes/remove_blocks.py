"""RemoveBlocks: a GraphModule without some of its residual branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from torch import fx

from stp_fx.analysis.blocks import blocks_named, blocks_of, outermost
from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import is_a, shown
from stp_fx.errors import FunctionChangedError, InputError
from stp_fx.ir.provenance import provenance_of, with_provenance
from stp_fx.ir.validation import Budget, Validate, together
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass
from stp_fx.rewrite.validate import validate_blocks
from stp_fx.rewrite.without_blocks import without_blocks
from stp_fx.text import listed

__all__ = ["RemoveBlocks", "chosen_blocks", "names_of_blocks"]


@dataclasses.dataclass(frozen=True)
class RemoveBlocks(GraphPass):
    """Removes residual branches: the sum that adds a block becomes its other operand, and nodes, modules, parameters and buffers
    that only the block needs are gone. The input graph is only read.

    ``blocks`` are names, as :func:`stp_fx.blocks_of` gives them; a path that is no name means all blocks beneath it
    (``"model.layers.3"``), patterns are matched. None takes the plan that :class:`SelectBlocks` made in the same pipeline.
    ``validate``: whether the result is run beside the graph with masked blocks, and compared: "auto", True, False, or a limit in
    seconds (see :func:`stp_fx.trace`).

    Raises:
        InputError: no such block, or one that cannot be removed; says why.
        FunctionChangedError: the result computes something else than the masked graph.
        PassError: no names and no plan.

    Example:
        >>> import stp_fx, torch
        >>> layers = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> gm = stp_fx.trace(layers.eval(), torch.randn(2, 3, 8))
        >>> [block.name for block in stp_fx.blocks_of(gm)]
        ['layers.0.self_attn', 'layers.0', 'layers.1.self_attn', 'layers.1']
        >>> smaller = RemoveBlocks(("layers.0.self_attn",))(gm).graph_module
        >>> stp_fx.plan_of(smaller).blocks
        ('layers.0.self_attn',)
    """

    blocks: tuple[str, ...] | None = None
    validate: Validate = "auto"

    def __post_init__(self) -> None:
        Budget(self.validate)
        object.__setattr__(self, "blocks", names_of_blocks(self.blocks))

    def requires(self, gm: fx.GraphModule) -> None:
        super().requires(gm)
        if self.blocks is not None:
            blocks_named(gm, self.blocks)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        names = chosen_blocks(gm, self.blocks, artifacts, "RemoveBlocks")
        if not names:
            return Outcome(gm, False, artifacts)
        return Outcome(self._validated(gm, names, without_blocks(gm, names)), True, Artifacts(report=artifacts.report))

    def _validated(self, gm: fx.GraphModule, names: Sequence[str], result: fx.GraphModule) -> fx.GraphModule:
        known = provenance_of(gm).validation
        budget = Budget(self.validate, known, forwards=4 if known is None else max(4, 12 - known.forwards))
        if budget.off:
            return result
        found, text = validate_blocks(gm, names, result, budget)
        if text is not None:
            raise FunctionChangedError(
                f"removing {listed(names, 6)} changes the function: {text} between the graph with these blocks masked and the "
                "one without them. Keep them; validate=False skips the check",
                tuple(names),
            )
        return with_provenance(result, validation=together(known, found))


def names_of_blocks(given: object) -> tuple[str, ...] | None:
    """Names of blocks as a tuple; those of a plan, if it is one.

    Raises:
        InputError: neither.
    """
    if given is None or isinstance(given, PrunePlan):
        return None if given is None else given.blocks
    names = () if is_a(given, str) or not is_a(given, Sequence) else tuple(cast("Sequence[object]", given))
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"`blocks` is a sequence of names (see stp_fx.blocks_of), a plan or None; got {shown(given)}")
    return cast("tuple[str, ...]", names)


def chosen_blocks(gm: fx.GraphModule, names: tuple[str, ...] | None, artifacts: Artifacts, name: str) -> tuple[str, ...]:
    """The blocks that are named, or that the plan of the pipeline names, without those inside others; ``name``: of the pass.

    Raises:
        PassError: no names and no plan.
        InputError: no such block, or one that cannot be removed.
    """
    found = blocks_named(gm, artifacts.planned(name).blocks if names is None else names)
    return tuple(block.name for block in outermost(found, blocks_of(gm)))
