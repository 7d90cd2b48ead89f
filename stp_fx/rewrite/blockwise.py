"""Blocks trained one after the other, each to give what it gave in the original, on what the repaired network gives it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.consumers import linear_calls
from stp_fx.analysis.plan import PrunePlan
from stp_fx.analysis.sites import find_sites
from stp_fx.errors import InputError
from stp_fx.ir.in_place import may_write
from stp_fx.ir.nested import mapped
from stp_fx.measure.calibration import arguments_of, batches, device_of, reiterable
from stp_fx.measure.distributed import several_processes, summed
from stp_fx.progress import carrying, progress_of, steps
from stp_fx.rewrite.blocks import Block, TrainedCall, Values, find_blocks, trained_calls, values_of
from stp_fx.rewrite.counterparts import KeptPositions, calls_by_parameter, checked_original, take_over
from stp_fx.rewrite.removal import is_partial, remove
from stp_fx.rewrite.rms_norm import rms_scale_factors
from stp_fx.rewrite.sequential import Repaired, reconstruct
from stp_fx.rewrite.side_by_side import BatchState, Network, Seen, States, memory_limit
from stp_fx.rewrite.slicing import copied
from stp_fx.rewrite.training import Goal, Pairs, Parameters, Training, in_random_order, root_mean_square

__all__ = ["Start", "match"]

Start = Literal["sequential"]

_SAME = 1e-9
"""Errors whose square is a smaller part of the target's variance are rounding: the block is left as it is."""
_HELD_OUT = 8
"""Of so many batches, one is held out; of a single batch, of so many rows."""
_CHECKS = 8
"""How often the observations held out are looked at."""
_ROUTED = "its input is routed by data: indices or masks before it differ between the original and the pruned network"
_OTHER_SHAPE = "what its block gives has another shape than in the original network"
_ELSEWHERE = "its weight is read outside of its block as well: "
_NO_TARGET = "nothing that can be compared with the original network comes after it"


def match(
    gm: fx.GraphModule,
    plan: PrunePlan,
    calibration: Iterable[Any],
    training: Training,
    *,
    whole: bool = False,
    start: Start | None = "sequential",
    memory: int | None = None,
    original: fx.GraphModule | None = None,
) -> Repaired:
    """A copy of ``gm`` in which what ``plan`` keeps has been trained, block after block, or the ``whole`` network at once; see
    :class:`stp_fx.passes.ReconstructBlockwise` and :class:`stp_fx.passes.Distill`.

    Raises:
        PlanError: the plan does not fit.
        InputError: no batch, one that does not fit, values that are not finite, nothing to hold out, or an ``original`` that
            does not fit.
    """
    target = checked_original(gm, original)
    with torch.inference_mode(False), torch.no_grad():
        graph = analyze(gm)
        survivors = graph.survivors(plan, partial=is_partial(gm))
        if plan.is_empty:
            return Repaired(gm, (), {})
        data = carrying(_Differentiable(reiterable(calibration)), progress_of(calibration))
        begun = Repaired(gm, (), {}) if start is None else reconstruct(gm, plan, data, memory=memory, original=target)
        run = _Blocks(target, remove(begun.graph_module, plan), KeptPositions(graph, survivors), training, whole)
        run.through(data, memory_limit(device_of(gm)) if memory is None else memory)
        layers = tuple(dict.fromkeys((*begun.layers, *run.layers)))
        if not run.changed:
            return Repaired(begun.graph_module, layers, run.left_alone)
        result = copied(begun.graph_module)
        take_over(result, run.small, survivors, run.changed, rms_scale_factors(gm, graph, survivors))
    return Repaired(result, layers, run.left_alone)


class _Differentiable:
    """Batches of which values that were made under ``torch.inference_mode`` are copies: autograd refuses to save those."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data:
            yield mapped(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, batch)

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _Split:
    """The batches that are trained on, and those that are held out. Of a single batch, ``rows`` are held out."""

    trained: tuple[int, ...]
    held: tuple[int, ...]
    rows: bool

    def part(self, value: torch.Tensor, held: bool) -> torch.Tensor:
        """The rows of a value that are held out, or the others."""
        if not self.rows:
            return value
        place = torch.arange(len(value) - 1, -1, -1, device=value.device)
        return value[(place % _HELD_OUT == 0) == held]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> _Split:
        if len(numbers) == 1:
            return cls(tuple(numbers), tuple(numbers), True)
        held = {k for place, k in enumerate(reversed(numbers)) if place % _HELD_OUT == 0}
        return cls(tuple(k for k in numbers if k not in held), tuple(k for k in numbers if k in held), False)


class _Blocks:
    """``original`` network, and the ``small`` one, whose blocks are trained in order."""

    def __init__(self, gm: fx.GraphModule, small: fx.GraphModule, kept: KeptPositions, training: Training, whole: bool) -> None:
        self.small = small.requires_grad_(False)
        self._gm, self._kept, self._training, self._whole = gm, kept, training, whole
        self._known = {node.name: node for node in gm.graph.nodes}
        self._readers = calls_by_parameter(small)
        self._calls, self.left_alone = trained_calls(small)
        known = {call.node for call in linear_calls(small)} | {call.node for call in self._calls if call.recurrent}
        for site in find_sites(gm).all:
            if site.weights and site.reader not in known and not kept.is_whole(site.source):
                self.left_alone[site.reader] = "it is neither a linear nor a recurrent layer nor a convolution, or it has hooks"
        self.layers: list[str] = []
        self.changed: list[str] = []

    def through(self, data: Iterable[Any], limit: int) -> None:
        """Trains all blocks."""
        given = [arguments_of(self._gm, batch) for batch in batches(self._gm, data, "block-wise matching")]
        plain = Network(self.small, self._kept.is_whole)
        blocks = self._found(plain, values_of(plain, _own(given[0])))
        held = set(blocks[-1].targets) if blocks else set[str]()  # those of the others are read later
        self.pruned = Network(self.small, self._kept.is_whole, held)
        self.original = Network(self._gm, self._kept.is_whole, held)
        states = [BatchState((self.original.start(_own(each)), self.pruned.start(_own(each)))) for each in given]
        del given  # the states let go of inputs that nothing reads any more
        with (
            States(states, (self.original, self.pruned), limit) as kept,
            steps("training blocks", len(blocks), progress_of(data)) as done,
        ):
            for number, block in enumerate(blocks):
                self._match(kept, block, number)
                done()

    def _found(self, network: Network, values: Values) -> list[Block]:
        layers = () if self._whole else [call.node for call in self._calls if call.contracts and self._runs(network, call)]
        blocks = find_blocks(network, values, self._known, layers)
        for call in self._calls:
            if self._runs(network, call) and not any(block.holds(network, call.node) for block in blocks):
                self.left_alone[call.node] = _NO_TARGET
        return blocks

    @staticmethod
    def _runs(network: Network, call: TrainedCall) -> bool:
        return network.by_name[call.node] not in network.left_out

    # -- one block -------------------------------------------------------------------------------------------------

    def _match(self, states: States, block: Block, number: int) -> None:
        calls = self._trainable(block)
        if not calls:
            return
        goal = Goal(len(block.targets), device_of(self.small))
        reason, split, error = self._compared(states, block, goal)
        if reason is None and error <= _SAME:
            return
        if reason is None:
            reason = self._train(states, block, goal, split, calls, number)
        if reason is not None:
            self.left_alone.update((call.node, reason) for call in calls if call.contracts)

    def _trainable(self, block: Block) -> list[TrainedCall]:
        """The calls of a block whose parameters nothing outside of it reads."""
        found: list[TrainedCall] = []
        for call in self._calls:
            if not block.holds(self.pruned, call.node) or not self._runs(self.pruned, call):
                continue
            readers = {r for name in call.parameters for r in self._readers[id(self.small.get_parameter(name))]}
            others = sorted(r for r in readers if not block.holds(self.pruned, r))
            if others:
                self.left_alone[call.node] = f"{_ELSEWHERE}{', '.join(others[:4])}"
            else:
                found.append(call)
        return found

    def _compared(self, states: States, block: Block, goal: Goal) -> tuple[str | None, _Split, float]:
        """Runs both networks to the end of a block; why it cannot be trained, what is held out, and the error so far."""
        numbers: list[int] = []
        routed = unlike = 0
        for number, state in enumerate(states):
            state.advance(1, self.pruned, block.start)
            state.advance(0, self.original, max(self.original.at[name] for name in block.targets) + 1)
            pairs = self._pairs(state, block, state.see)
            if not state.is_alike(self.original, block.targets):
                routed += 1
            elif any(given.shape != wanted.shape for given, wanted in pairs):
                unlike += 1
            elif any(wanted.numel() for _, wanted in pairs):
                self._check_finite(pairs, block, number)
                goal.add([wanted for _, wanted in pairs])
                numbers.append(number)
        if several_processes():
            counts = torch.tensor([routed, unlike], dtype=torch.float64, device=device_of(self.small))
            summed(0, [counts])
            routed, unlike = int(counts[0]), int(counts[1])
        split = _Split.of(numbers)
        if routed or unlike or not numbers:
            return (_ROUTED if routed else _OTHER_SHAPE), split, 0.0
        if split.rows and not all(len(wanted) > 1 for _, wanted in self._pairs(states[numbers[0]], block)):
            raise InputError(
                "matching holds observations out, and there is one: give at least two batches, or a batch of two rows"
            )
        return None, split, goal.error(self._pairs(states[k], block) for k in numbers)

    @staticmethod
    def _check_finite(pairs: Pairs, block: Block, number: int) -> None:
        for name, values in zip(block.targets, pairs, strict=True):
            if not all(bool(torch.isfinite(value).all()) for value in values):
                raise InputError(f"calibration batch {number}: the output of {name!r} is not finite")

    def _pairs(self, state: BatchState, block: Block, seen: Seen = lambda *_: None) -> Pairs:
        """The outputs of a block, and the kept channels of the original's outputs."""
        env = dict(state.values[1])
        nodes = self.pruned.nodes[block.start : block.stop]
        if any(may_write(node, self.pruned.module) for node in nodes):
            env = {n: v if n.op == "get_attr" else mapped(torch.Tensor, torch.clone, v) for n, v in env.items()}
        self.pruned.advance(env, block.start, block.stop, seen)
        wanted = [self._kept.take(name, state.values[0][self.original.by_name[name]]) for name in block.targets]
        return [(env[self.pruned.by_name[name]], each) for name, each in zip(block.targets, wanted, strict=True)]

    def _parts(self, state: BatchState, block: Block, split: _Split, held: bool) -> Pairs:
        return [(split.part(given, held), split.part(wanted, held)) for given, wanted in self._pairs(state, block)]

    # -- its training ----------------------------------------------------------------------------------------------

    def _train(
        self, states: States, block: Block, goal: Goal, split: _Split, calls: Sequence[TrainedCall], number: int
    ) -> str | None:
        """Trains the parameters of a block, and keeps what was best on the observations held out; why there is no gradient."""

        def error() -> float:
            return goal.error(self._parts(states[k], block, split, True) for k in split.held)

        names, scales = self._named(calls)
        parameters = Parameters([self.small.get_parameter(name) for name in names], scales)
        best, least, gained, reason = parameters.numbers(), error(), False, None
        order = in_random_order(split.trained, self._training.seed + number)
        steps, recurrent = self._training.steps, any(call.recurrent for call in calls)
        for step in range(steps):
            with _differentiable(recurrent):
                scale, reason = self._backward(states[next(order)], block, goal, split, parameters.in_half_precision)
            if self._anywhere(reason):
                reason = reason or "its gradient cannot be computed"
                break
            parameters.step(self._training.rate_at(step), scale)
            if (step + 1) % max(1, steps // _CHECKS) == 0 or step + 1 == steps:
                now = error()
                if now < least:
                    best, least, gained = parameters.numbers(), now, True
        parameters.take(best)
        parameters.close()
        if gained:
            self.changed += names
            self.layers += [call.node for call in calls if call.contracts]
        return reason

    def _named(self, calls: Sequence[TrainedCall]) -> tuple[list[str], list[float]]:
        """The parameters of some calls, each once, with their scales: of a bias, at least that of the weight."""
        found: dict[int, tuple[str, float]] = {}
        for call in calls:
            own = [self.small.get_parameter(name) for name in call.parameters]
            least = root_mean_square(own[0])
            for name, parameter in zip(call.parameters, own, strict=True):
                found.setdefault(id(parameter), (name, max(least, root_mean_square(parameter))))
        return [name for name, _ in found.values()], [scale for _, scale in found.values()]

    def _backward(self, state: BatchState, block: Block, goal: Goal, split: _Split, half: bool) -> tuple[float, str | None]:
        """The gradients of one batch's error, times a number that keeps them in the range of half precision; or why there are
        none."""
        with torch.enable_grad():
            try:
                pairs = self._parts(state, block, split, False)
                scale = max(1.0, max(wanted.numel() for _, wanted in pairs) ** 0.5) if half else 1.0
                loss = goal.loss(pairs) * scale
                if not loss.requires_grad:
                    return scale, "no gradient reaches its weight"
                loss.backward()
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                return 1.0, f"its gradient cannot be computed: {error}"
        return scale, None

    def _anywhere(self, reason: str | None) -> bool:
        """Whether there is a reason on any process."""
        if not several_processes():
            return reason is not None
        found = torch.tensor([float(reason is not None)], dtype=torch.float64, device=device_of(self.small))
        summed(0, [found])
        return bool(found.item())


def _differentiable(recurrent: bool) -> contextlib.AbstractContextManager[None]:
    """cuDNN differentiates recurrent layers in training mode only; PyTorch's own kernels do in evaluation as well."""
    return torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()


def _own(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies: a network may write into its inputs, and each has to read them as they came."""
    return mapped(torch.Tensor, torch.clone, arguments)
