"""``score_blocks``: what the network loses with a residual branch, measured on data.

"influence" is one minus the cosine between what a sum is without the branch and with it, averaged over positions (block
influence, ShortGPT, arXiv 2403.03853, eq. 1); "error" the energy of the branch relative to that of the sum; "taylor" the
first-order change of the loss when the branch fades out, ``|sum(gradient * branch)|``, averaged over batches. Each scores all
blocks in one pass over the data. "output" and "loss" run the network once more for every block, without it: the squared error of
the outputs relative to their energy, and how much the loss rises.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import fx, nn

from stp_fx.analysis.blocks import Block, blocks_of
from stp_fx.analysis.build import analyze
from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import is_choice, shown
from stp_fx.errors import CriterionError, InputError
from stp_fx.measure.calibration import arguments_of, batches, eval_twin, watched
from stp_fx.measure.gradients import Loss, cross_entropy
from stp_fx.progress import Progress, stepped
from stp_fx.rewrite.removal import mask
from stp_fx.rules import TensorDims, has_ids
from stp_fx.selection.damage import Outputs

__all__ = ["BLOCK_CRITERIA", "BlockCriterion", "score_blocks"]

BlockCriterion = Literal["influence", "error", "taylor", "output", "loss"]
BLOCK_CRITERIA: tuple[str, ...] = ("influence", "error", "taylor", "output", "loss")


def score_blocks(
    gm: fx.GraphModule,
    criterion: BlockCriterion = "influence",
    calibration: Iterable[Any] | torch.Tensor | None = None,
    *,
    loss: Loss | None = None,
    samples: int = 256,
    progress: Progress = None,
) -> dict[str, float]:
    """The score of every block that can be removed, by name; higher for more important. ``gm`` is only read, in eval mode.

    Args:
        gm: a graph that :func:`stp_fx.trace` captured.
        criterion: "influence", "error", "taylor", "output" or "loss"; see :mod:`stp_fx.selection.block_scores`.
        calibration: batches: a tensor each, or what a DataLoader yields.
        loss: ``loss(gm, batch)``, a scalar, for "taylor" and "loss"; cross-entropy on ``(input, target)`` if None.
        samples: of the first batches, that "output" reads.
        progress: as for :func:`stp_fx.prune_graph`.

    Raises:
        InputError: an unknown criterion, no batch, or one that does not fit the graph.
        CriterionError: a score that is not a finite number.

    Example:
        >>> import stp_fx, torch
        >>> layers = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> gm = stp_fx.trace(layers.eval(), torch.randn(2, 3, 8))
        >>> list(score_blocks(gm, "influence", [torch.randn(4, 3, 8)]))
        ['layers.0.self_attn', 'layers.0', 'layers.1.self_attn', 'layers.1']
    """
    if not is_choice(criterion, BLOCK_CRITERIA):
        raise InputError(f"unknown criterion for blocks {shown(criterion)}; known: {', '.join(BLOCK_CRITERIA)}")
    blocks = [block for block in blocks_of(gm) if block.removable]
    if not blocks:
        return {}
    data = watched(calibration, progress)
    if criterion in ("influence", "error"):
        values = _of_streams(gm, blocks, data, criterion)
    elif criterion == "taylor":
        values = _taylor(gm, blocks, data, loss or cross_entropy)
    elif criterion == "output":
        output = Outputs.of_first(gm, data, samples)
        values = [output.error(_masked(gm, block)) for block in stepped("scoring blocks", blocks, progress)]
    else:
        whole = _mean_loss(gm, gm, data, loss or cross_entropy)
        values = [
            _mean_loss(gm, _masked(gm, block), data, loss or cross_entropy) - whole
            for block in stepped("scoring blocks", blocks, progress)
        ]
    wrong = next((block.name for block, value in zip(blocks, values, strict=True) if not abs(value) < float("inf")), None)
    if wrong is not None:
        raise CriterionError(f"the {criterion} of block '{wrong}' is not finite; check the data and the weights for NaN")
    return {block.name: value for block, value in zip(blocks, values, strict=True)}


def _masked(gm: fx.GraphModule, block: Block) -> fx.GraphModule:
    return mask(gm, PrunePlan({}, {}, (block.name,)))


def _mean_loss(gm: fx.GraphModule, network: fx.GraphModule, data: Any, loss: Loss) -> float:
    twin, found = eval_twin(network), list[float]()
    with torch.no_grad():
        for batch in batches(gm, data, "scoring blocks", show=False):
            found.append(float(loss(twin, batch)))
    return sum(found) / len(found)


def _of_streams(gm: fx.GraphModule, blocks: Sequence[Block], data: Any, criterion: str) -> list[float]:
    watches = [_Watch(criterion == "influence", _channel_dim(gm, block)) for block in blocks]

    def watched(graph: fx.Graph, block: Block, name: str, known: dict[str, fx.Node]) -> None:
        graph.call_module(name, (known[block.root], known[block.value]))

    network = eval_twin(_instrumented(gm, blocks, watches, after=watched))
    with torch.no_grad():
        for batch in batches(gm, data, "scoring blocks"):
            network(*arguments_of(gm, batch))
    return [watch.result() for watch in watches]


def _taylor(gm: fx.GraphModule, blocks: Sequence[Block], data: Any, loss: Loss) -> list[float]:
    gates = [_Gate() for _ in blocks]
    network, sums = eval_twin(_instrumented(gm, blocks, gates)), list[list[float]]()
    with torch.enable_grad():
        for batch in batches(gm, data, "scoring blocks"):
            for gate in gates:
                gate.held[0] = torch.ones((), requires_grad=True)
            value = loss(network, batch)
            if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
                raise InputError("`loss(gm, batch)` gives a scalar tensor that follows from the graph's output")
            found = torch.autograd.grad(value.sum(), [gate.held[0] for gate in gates], allow_unused=True)
            sums.append([0.0 if each is None else abs(float(each)) for each in found])
    return [sum(column) / len(column) for column in zip(*sums, strict=True)]


def _channel_dim(gm: fx.GraphModule, block: Block) -> int:
    """The dimension of the channels of a sum: the one that parameters have an axis of; the last if that tells nothing."""
    value = analyze(gm).value(block.root)
    dims = [k for k, dim in enumerate(value.dims) if has_ids(dim)] if isinstance(value, TensorDims) else []
    return dims[0] if len(dims) == 1 else -1


class _Watch(nn.Module):
    """Sums up what a sum and its branch are, position by position."""

    _is_impure: ClassVar[bool] = True  # its call has no result

    def __init__(self, angle: bool, dim: int) -> None:
        super().__init__()
        self.angle, self.dim = angle, dim
        self.sums = torch.zeros(2, dtype=torch.float64)

    def forward(self, total: torch.Tensor, value: torch.Tensor) -> None:
        total, value = (each.detach().to(torch.promote_types(each.dtype, torch.float32)) for each in (total, value))
        if self.angle:
            near = torch.nn.functional.cosine_similarity(total - value, total, dim=self.dim)
            self.sums += torch.tensor([float((1 - near).sum(dtype=torch.float64)), near.numel()])
        else:
            value = value.expand_as(total)
            self.sums += torch.tensor([float(each.square().sum(dtype=torch.float64)) for each in (value, total)])

    def result(self) -> float:
        return float(self.sums[0] / self.sums[1].clamp_min(1e-300))


class _Gate(nn.Module):
    """A factor of one before a branch is added."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [torch.ones(())]  # a list, which copies for measuring share

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.held[0].to(value)


After = Callable[[fx.Graph, Block, str, dict[str, fx.Node]], None]


def _instrumented(
    gm: fx.GraphModule, blocks: Sequence[Block], modules: Sequence[nn.Module], after: After | None = None
) -> fx.GraphModule:
    """A shallow copy of ``gm`` with a module for every block: between its value and its sum, or called by ``after`` where both
    are known."""
    result = copy.copy(gm)
    names = [f"stp_fx_block_{k}" for k in range(len(blocks))]
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    graph.set_codegen(copy.copy(gm.graph._codegen))
    known: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        gated: dict[str, fx.Node] = {}
        for name, block in zip(names, blocks, strict=True):
            if after is None and block.total == node.name:
                gated[block.value] = graph.call_module(name, (known[block.value],))
        known[node.name] = graph.node_copy(node, lambda each, gated=gated: gated.get(each.name) or known[each.name])
        for name, block in zip(names, blocks, strict=True):
            if after is not None and block.root == node.name:
                after(graph, block, name, known)
    for name, module in zip(names, modules, strict=True):
        result.add_module(name, module)
    result.graph = graph
    return result
