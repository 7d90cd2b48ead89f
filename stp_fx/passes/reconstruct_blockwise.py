"""ReconstructBlockwise: blocks trained in order, each to give what it gave in the original network."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from stp_fx.passes.by_training import RepairByTraining

__all__ = ["ReconstructBlockwise"]


@dataclasses.dataclass(frozen=True)
class ReconstructBlockwise(RepairByTraining):
    """Trains the blocks of the pruned network one after the other on ``calibration``, without labels: a block is given what the
    network *as pruned and repaired so far* gives it, and its output is to be what the original network has there.

    A block is found in the graph: it ends where one value carries all that inputs and parameters have made (behind the sum of a
    residual block, an attention, an MLP; behind a convolution with its norm and activation). Networks in which several such
    values go on side by side (a U-Net, a decoder that reads an encoder) are one block there.

    Weights and biases of linear layers, recurrent layers and convolutions and the affine parameters of norms are trained by Adam
    on the mean squared error, whether they require a gradient or not. Everything runs in evaluation, with BatchNorm's statistics
    as they are. The learning rate rises over a tenth of the steps and falls to zero as a cosine does; it is relative to the root
    mean square of the layer's weight. A step reads one batch. Every eighth batch is held out (of a single batch, every eighth
    row), and a block keeps the parameters that were best there, which may be those from before. Networks in half precision are
    trained through copies in single precision. Weights that are computed from others, or read by another block too, stay as
    they are; the log names them.

    Seeded: nothing depends on PyTorch's global generator, unless the network itself draws numbers in evaluation.

    Args:
        steps: of the optimizer, a block.
        rate: the learning rate at its highest, relative to the weights. Blocks bear a higher one than a whole network.
        start: the repair before the training: "sequential" (:class:`ReconstructSequentially`), or None.
        seed: of the order of batches.
        memory: bytes of values that are kept in memory; None: half of what is free. Others lie in temporary files.
        original: the network whose values are to be reached, by default the given graph. Hand it over where a pass before this
            one has repaired weights already.
        plan: by default the one of :class:`SelectUnits` in the same pipeline.

    Raises:
        PassError: no plan.
        PlanError: the plan does not fit.
        InputError: no batch, one that does not fit, values that are not finite, nothing to hold out (a single observation), or an
            ``original`` with other calls or shapes.

    Source: block-wise reconstruction (arXiv 2510.14444) with asymmetric inputs (GPTAQ, arXiv 2504.02692); learning rates relative
    to parameters as in Adafactor (arXiv 1804.04235).
    """

    reported: ClassVar[str] = "blockwise"
    rate: float = 0.03
