"""Distillation: the outputs and the inner values of a teacher, usually the unpruned network, as a term of the training loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn
from typing_extensions import Self

from stp_fx.checks import check_callable, is_a, is_choice, is_number, is_whole, shown
from stp_fx.errors import InputError, translated
from stp_fx.ir.nested import leaves_of, own_containers
from stp_fx.ir.outputs import parts_of
from stp_fx.ir.provenance import has_provenance, provenance_of
from stp_fx.ir.shapes import tensors_of
from stp_fx.ir.train_eval import in_mode
from stp_fx.measure.calibration import arguments_of, device_of
from stp_fx.rewrite.training import exact
from stp_fx.text import listed
from stp_fx.training.features import Correspondence, Taps, Watched, checked_graph, named_features

__all__ = ["Distillation"]

Loss = Literal["kl", "mse"]
_TEMPERATURE = 4.0


class Distillation:
    """The difference of a student's outputs from its teacher's, as a loss: one more forward pass of the teacher per batch.

    ::

        teacher = copy.deepcopy(gm)                          # before the first pruning step
        distill = stp_fx.Distillation(teacher, gm, features="blocks")
        for x, y in loader:
            outputs = model(x)                               # gm, or what is wrapped around it
            loss = F.cross_entropy(outputs, y) + distill(outputs, x)

    The student may be masked, pruned, compiled, wrapped by DistributedDataParallel or run under autocast; a
    :class:`stp_fx.PATPassManager` may prune it at any time. No second forward pass of it is made: its outputs are given, and
    features are kept by modules without state that are put into its graph (:meth:`close` takes them out). Features are compared
    at the channels that the student still has, and that are not masked.

    The teacher runs in evaluation mode, without gradients, under the autocast that is on; its flags, parameters and gradients
    stay as they are. It is part of no state dict and no ``parameters()``, also where a module keeps the distillation as an
    attribute, so it is not moved with the student either: :meth:`to` moves it. Nothing needs to be saved: a resumed run makes the
    teacher from the same weights as the first.

    Args:
        teacher: a graph of :func:`stp_fx.trace`, or any module if ``features`` is None. It must not share trained parameters with
            the student.
        student: the student's graph, as ``PATPassManager.model``; needed for ``features`` alone.
        loss: "kl", ``temperature ** 2`` times the divergence of the softened distributions over classes, averaged over all other
            dimensions (Hinton et al., "Distilling the knowledge in a neural network", arXiv 1503.02531); "mse", the mean of the
            squared differences of the logits (Ba and Caruana, arXiv 1312.6184); or a function ``(student, teacher) -> scalar`` of
            the logits.
        temperature: of "kl" alone; 4 if it is not given.
        class_dim: the dimension of the classes; may be left out where logits are [batch, classes]. -1 for the logits of
            language models, 1 for those of segmentation.
        features: None; "blocks", the values that alone carry what is computed, such as the stream after each residual block; or
            names of nodes or modules. Their term is the mean over features of the squared error relative to the variance of the
            teacher's value (FitNets, Romero et al., arXiv 1412.6550; no regressor is needed, since kept channels correspond).
        weight: factor of the term of the logits; 0 leaves it out.
        feature_weight: factor of the term of the features.
        output: which output is the logits, by key, field or position; may be left out if there is one tensor of floating point
            numbers that is no scalar.

    Raises:
        InputError: arguments that contradict each other or the graphs, or shared parameters.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module | None = None,
        *,
        loss: Loss | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = "kl",
        temperature: float | None = None,
        class_dim: int | None = None,
        features: Literal["blocks"] | Iterable[str] | None = None,
        weight: float = 1.0,
        feature_weight: float = 1.0,
        output: str | int | None = None,
    ) -> None:
        for name, module in (("teacher", teacher), ("student", student)):
            if not is_a(module, nn.Module) and not (module is None and name == "student"):
                raise InputError(f"`{name}` is {shown(module)}; give a torch.nn.Module")
        self.teacher: nn.Module = teacher
        self.loss: Any = loss if is_choice(loss, ("kl", "mse")) else _checked_loss(loss)
        self.temperature: float = _checked_temperature(temperature, self.loss)
        if not (class_dim is None or is_whole(class_dim)):
            raise InputError(f"`class_dim` is a dimension, such as 1 or -1; got {shown(class_dim)}")
        if not (output is None or is_whole(output) or is_a(output, str)):
            raise InputError(f"`output` is a key, field or position of the outputs, such as 'logits'; got {shown(output)}")
        self.class_dim, self.output = class_dim, output
        for name, value in (("weight", weight), ("feature_weight", feature_weight)):
            if not is_number(value) or not 0 <= value < math.inf:
                raise InputError(f"`{name}` is a finite number of at least 0; got {shown(value)}")
        self.weight, self.feature_weight = float(weight), float(feature_weight)
        if not self.weight and features is None:
            raise InputError("`weight` is 0 and there are no features, so nothing is compared: give one of them")
        self.features: tuple[str, ...] = ()
        if features is not None:
            self.features = named_features(checked_graph("teacher", teacher), features)
            checked_graph("student", student)
        self._student: nn.Module | None = None
        self._taps: Taps | None = None
        self._watched: Watched | None = None
        self._correspondence: Correspondence | None = None
        self.student = student

    def __repr__(self) -> str:
        loss = f"{self.loss!r}, temperature={self.temperature:g}" if self.loss == "kl" else shown(self.loss)
        features = f", {len(self.features)} features: {listed(self.features)}" if self.features else ""
        return f"Distillation({type(self.teacher).__name__}, {loss}{features})"

    @property
    def student(self) -> nn.Module | None:
        """The student, whose features are read. A manager keeps the object; where another one takes its place, set this."""
        return self._student

    @student.setter
    def student(self, student: nn.Module | None) -> None:
        _refuse_shared(self.teacher, student)
        taps, correspondence = None, None
        if self.features:
            graph, teacher = checked_graph("student", student), checked_graph("teacher", self.teacher)
            correspondence = Correspondence(teacher, graph)
            taps = Taps(graph, self.features, frozenset(node.name for node in teacher.graph.nodes))
        self.close()
        self._student, self._taps, self._correspondence = student, taps, correspondence

    def close(self) -> None:
        """Takes out of the student what reads its features, as at the end of training; outputs are compared as before."""
        if self._taps is not None and isinstance(self._student, fx.GraphModule):
            self._taps.remove(self._student)
        self._taps = None

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the teacher, as ``torch.nn.Module.to`` does; returns the distillation."""
        self.teacher.to(*args, **kwargs)
        return self

    # -- the loss --------------------------------------------------------------------------------------------------

    def __call__(self, outputs: Any, inputs: Any, *, where: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of :meth:`terms`: a differentiable scalar, float32 or wider, on the student's device.

        Raises:
            InputError: as :meth:`terms`.
        """
        first, *others = self.terms(outputs, inputs, where=where).values()
        for term in others:
            first = first + term.to(first.device)
        return first

    def terms(self, outputs: Any, inputs: Any, *, where: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The weighted terms "logits" and "features", as far as they are asked for.

        Args:
            outputs: what the student gave for ``inputs``, in its last forward pass.
            inputs: arguments of the teacher: a tensor, a tuple of positional ones, or a mapping by names.
            where: which positions count, bool of the logits' shape without the classes; for tokens that are no padding. Features
                count everywhere.

        Raises:
            InputError: the teacher fails on the inputs, or is on another device; outputs or features do not correspond; or the
                student has not been called.
        """
        given = self._taps.take(_graph(self._student)) if self._taps is not None else {}
        arguments = self._arguments(inputs)
        with torch.no_grad(), self._evaluating(), self._telling(arguments):
            taught, wanted = self._run(arguments)
        result: dict[str, torch.Tensor] = {}
        if self.weight or not given:
            result["logits"] = self.weight * self._logits_term(outputs, taught, where)
        if given:
            result["features"] = self.feature_weight * self._features_term(given, wanted)
        return result

    def _logits_term(self, outputs: Any, taught: Any, where: torch.Tensor | None) -> torch.Tensor:
        student, teacher = self._logits("student", outputs), self._logits("teacher", taught)
        if student.shape != teacher.shape:
            raise InputError(
                f"the student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: give the student's "
                "outputs for the same inputs, and a teacher of the same classes"
            )
        student, teacher = exact(student), exact(teacher.to(student.device))
        dim = self._dimension(student, where)
        if where is not None:
            student, teacher = _selected(student, teacher, where, dim)
            dim = -1
        if self.loss == "kl":
            log_p, log_q = (F.log_softmax(x / self.temperature, dim) for x in (student, teacher))
            divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim)
            return self.temperature**2 * _mean(divergence)
        if self.loss == "mse":
            return _mean((student - teacher).square())
        with translated(InputError, lambda said: f"`loss`, {shown(self.loss)}, fails with {said}"):
            value = self.loss(student, teacher)
        if not (is_a(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point()):
            raise InputError(f"`loss` is a function (student, teacher) -> scalar tensor; it gave {shown(value)}")
        return value

    def _features_term(self, given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> torch.Tensor:
        known = provenance_of(_graph(self._student))
        found = self._correspondence
        if found is None or found.of[0] is not known.plan or found.of[1] is not known.masked:
            found = self._correspondence = Correspondence(_graph(self.teacher), _graph(self._student))
        errors = [_relative_error(*found.pair(name, wanted[name], given[name])) for name in self.features]
        return torch.stack([error.to(errors[0].device) for error in errors]).mean()

    def _logits(self, whose: str, outputs: Any) -> torch.Tensor:
        parts: dict[str | int, Any] = {0: outputs} if is_a(outputs, torch.Tensor) else parts_of(outputs)
        if self.output is not None and not is_a(outputs, torch.Tensor):
            parts = {name: value for name, value in parts.items() if name == self.output}
        found = {name: value for name, value in parts.items() if _is_logits(value)}
        if len(found) == 1:
            return next(iter(found.values()))
        has = listed([repr(name) for name in parts_of(outputs)], 8) or f"a {type(outputs).__name__}"
        if self.output is not None:
            raise InputError(f"the {whose} gives no tensor of floating point numbers {self.output!r}; it gives {has}")
        raise InputError(f"the {whose} gives {len(found)} tensors that may be logits, of {has}: say which, output='logits'")

    def _dimension(self, logits: torch.Tensor, where: torch.Tensor | None) -> int:
        if self.class_dim is not None:
            if not -logits.dim() <= self.class_dim < logits.dim():
                raise InputError(f"`class_dim` is {self.class_dim}, and the logits are {tuple(logits.shape)}")
            return int(self.class_dim)
        if logits.dim() > 2 and (self.loss == "kl" or where is not None):
            raise InputError(
                f"the logits are {tuple(logits.shape)}: say which dimension is that of the classes, class_dim=-1 (language "
                "models) or class_dim=1 (segmentation)"
            )
        return -1

    # -- the teacher -----------------------------------------------------------------------------------------------

    def _arguments(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of the teacher's call: positional ones, and those by name."""
        inputs = own_containers(inputs)
        if isinstance(self.teacher, fx.GraphModule) and has_provenance(self.teacher):
            positional, named = arguments_of(self.teacher, inputs), {}
        elif is_a(inputs, Mapping):
            positional, named = (), {str(key): value for key, value in inputs.items()}
        else:
            positional, named = tuple(inputs) if is_a(inputs, tuple, list) else (inputs,), {}
        device = device_of(self.teacher)
        places = {t.device for t in leaves_of(torch.Tensor, [positional, named])}
        if places and device not in places and not places & {t.device for t in tensors_of(self.teacher)}:
            found = sorted(map(str, places))
            raise InputError(
                f"the teacher is on {device}, its inputs are on {listed(found)}: distill.to({found[0]!r}) moves the teacher"
            )
        return positional, named

    def _run(self, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, dict[str, torch.Tensor]]:
        if self._taps is None:
            return self.teacher(*arguments[0], **arguments[1]), {}
        teacher = _graph(self.teacher)
        if self._watched is None or self._watched.graph is not teacher.graph:
            self._watched = Watched(teacher, self.features)
        return self._watched(teacher, arguments[0])

    def _evaluating(self) -> contextlib.AbstractContextManager[None]:
        training = any(module.training for module in self.teacher.modules())
        return in_mode(self.teacher, False) if training else contextlib.nullcontext()

    @contextlib.contextmanager
    def _telling(self, arguments: Any) -> Any:
        """Around a call of the teacher: its errors say what it was given."""
        try:
            yield
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a module raises
            tensors = leaves_of(torch.Tensor, arguments)
            first = next((p for p in self.teacher.parameters() if p.is_floating_point()), None)
            own = "no parameters" if first is None else f"parameters of {first.dtype} on {first.device}"
            raise InputError(
                f"the teacher, {type(self.teacher).__name__} with {own}, fails with {type(error).__name__}: {error}; its inputs "
                f"are {listed([f'{tuple(t.shape)} {t.dtype} on {t.device}' for t in tensors])}. Give `inputs` as it takes them "
                "(a tensor, a tuple, a mapping by names); distill.to(...) changes its device or dtype"
            ) from error


def _graph(module: nn.Module | None) -> fx.GraphModule:
    assert isinstance(module, fx.GraphModule)
    return module


def _checked_loss(loss: object) -> Any:
    if loss is None or isinstance(loss, (str, type)):
        raise InputError(f"`loss` is 'kl', 'mse' or a function (student, teacher) -> scalar; got {shown(loss)}")
    return check_callable("loss", loss, "(student, teacher) -> scalar, 'kl' or 'mse'")


def _checked_temperature(temperature: object, loss: object) -> float:
    if temperature is None:
        return _TEMPERATURE
    if loss != "kl":
        raise InputError("`temperature` belongs to loss='kl': leave it out")
    if not is_number(temperature) or not 1e-3 <= temperature <= 1e6:
        raise InputError(f"`temperature` is a number from 0.001 to 1,000,000, such as 4.0; got {shown(temperature)}")
    return float(temperature)


def _refuse_shared(teacher: nn.Module, student: nn.Module | None) -> None:
    if student is None:
        return
    if not is_a(student, nn.Module):
        raise InputError(f"`student` is {shown(student)}; give a torch.nn.Module")
    own = {id(parameter) for parameter in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if id(parameter) in own and parameter.requires_grad:
            raise InputError(
                f"teacher and student share the parameter {name!r}, so the teacher would change in training (a traced graph "
                "shares the parameters of its model): give copy.deepcopy(...) of one as the teacher"
            )


def _is_logits(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0


def _selected(student: torch.Tensor, teacher: torch.Tensor, where: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits [positions, classes] of the positions that count."""
    student, teacher = student.movedim(dim, -1), teacher.movedim(dim, -1)
    if not is_a(where, torch.Tensor) or where.dtype != torch.bool or where.shape != student.shape[:-1]:
        got = f"{tuple(where.shape)}, {where.dtype}" if is_a(where, torch.Tensor) else shown(where)
        raise InputError(f"`where` holds a truth value for each position, bool {tuple(student.shape[:-1])}; got {got}")
    where = where.to(student.device)
    return student[where], teacher[where]


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Of no values, 0: a batch may have no position that counts."""
    return values.sum() / max(values.numel(), 1)


def _relative_error(wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The mean squared error beside the variance of what is wanted; 0 where that does not vary."""
    wanted, given = exact(wanted), exact(given)
    number = max(wanted.numel(), 1)
    spread = F.mse_loss(wanted, _mean(wanted).expand_as(wanted), reduction="sum") / number
    error = F.mse_loss(given, wanted, reduction="sum") / number
    return torch.where(spread > 0, error / torch.where(spread > 0, spread, 1.0), 0.0)
