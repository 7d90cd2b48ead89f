"""RemoveBlocks: a GraphModule without some of its residual branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx

from stp_fx.errors import FunctionChangedError
from stp_fx.ir.provenance import provenance_of, with_provenance
from stp_fx.ir.validation import Budget, Validate, together
from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.on_blocks import OnBlocks
from stp_fx.rewrite.validate import validate_blocks
from stp_fx.rewrite.without_blocks import without_blocks
from stp_fx.text import listed

__all__ = ["RemoveBlocks"]


@dataclasses.dataclass(frozen=True)
class RemoveBlocks(OnBlocks):
    """Removes residual branches: the sum that adds a block becomes its other operand, and nodes, modules, parameters and buffers
    that only the block needs are removed. The input graph is only read.

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

    validate: Validate = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget(self.validate)

    def run(self, gm: fx.GraphModule, artifacts: Artifacts) -> Outcome:
        names = self.chosen(gm, artifacts)
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
