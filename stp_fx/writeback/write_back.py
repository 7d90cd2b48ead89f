"""write_back: a pruned graph as a module of the original class."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import arguments_by_name, check_flag
from stp_fx.errors import InputError, WriteBackError
from stp_fx.ir.example import bound_arguments, by_name
from stp_fx.ir.provenance import has_provenance, provenance_of
from stp_fx.rewrite.slicing import copied
from stp_fx.writeback.basis import check_basis
from stp_fx.writeback.calls import Arguments, mapped, recorded
from stp_fx.writeback.check import Check, agree_in_double, stress
from stp_fx.writeback.config import fit_config
from stp_fx.writeback.fewer import fit_depth
from stp_fx.writeback.layers import removed_layers, with_names, without_layers
from stp_fx.writeback.other_forwards import numbers_of_other_forwards
from stp_fx.writeback.reads import holders_of
from stp_fx.writeback.search import Numbers, find_numbers
from stp_fx.writeback.sizes import Sizes
from stp_fx.writeback.tensors import smaller_copy, state_channels

__all__ = ["write_back"]

_log = logging.getLogger(__name__)


def write_back(
    pruned: fx.GraphModule,
    model: nn.Module,
    example_inputs: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    strict_config: bool = True,
) -> nn.Module:
    """A module of the class of ``model`` that computes what ``pruned`` does; neither of the two is changed.

    The tensors of ``pruned`` go into a deep copy of ``model`` (ties, hooks and train/eval flags are kept), and so do the numbers
    that describe them: attributes of modules, and of configs that they hold, which the forward reads. Which numbers those are is
    found by running the forward and watching what it reads. The result is accepted only if its outputs are those of ``pruned``,
    in eval mode, on the example and in other sizes that the graph takes (one more in the batch, one more of every other size),
    with random weights and with its own (in double precision, where rounding decides what ``topk`` chooses). Numbers that the
    forward does not read stay, but for those that torch's modules keep of their tensors, and those of other ``forward_...``.

    Entries of a ``ModuleList`` or ``Sequential`` of which the graph has no block left are left out, and their numbers follow.
    The config of a Hugging Face model (``save_pretrained``) is renewed so that a model built from it gives the same outputs.

    Args:
        pruned: what :func:`prune_graph` made of ``trace(model, ...)``; it may have been trained since.
        model: the module that was traced.
        example_inputs, kwargs: what to compare on, as for :func:`trace`. Default: values in the recorded shapes, integers 0 or 1.
        strict_config: False accepts, with a warning in the log, what runs but does not survive ``save_pretrained`` and
            ``from_pretrained``, since its config cannot describe it.

    Raises:
        InputError: ``pruned`` was not captured from ``model``, or is masked rather than removed.
        WriteBackError: the class cannot express the result; ``constants`` names what is in the way.

    Example:
        >>> import stp_fx, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pruned = stp_fx.prune_graph(net, example_inputs=torch.randn(2, 4))
        >>> write_back(pruned, net)[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    _check_arguments(pruned, model)
    check_flag("strict_config", strict_config)
    pattern, given = _arguments(pruned, model, example_inputs, kwargs)
    model, pruned = _of_equal_depth(model, pruned, strict_config)
    with torch.random.fork_rng(devices=[]):
        result, settled = smaller_copy(pruned, model)
        sizes = Sizes(provenance_of(pruned).plan or PrunePlan({}, {}), model)
        graph, twin = copied(pruned), copied(result)
        stress(graph, twin)
        stressed = Check(graph, given, pattern)
        _put(result, find_numbers(twin, sizes, settled, stressed))
        state_channels(result)
        check = Check(pruned, given, pattern)
        _accept(check, result, pruned, given, pattern)
        _put(result, numbers_of_other_forwards(result, model, sizes, settled, check.arguments))
        if _has_config(result):
            with _errors_of_the_config(model, strict_config):
                _check_config(model)
                fit_config(result, model, sizes, graph, stressed)
                _accept(check, result, pruned, given, pattern)
    _log.info("%s: outputs agree with the graph's in %d sizes", type(model).__name__, stressed.sizes)
    return result


def _of_equal_depth(model: nn.Module, pruned: fx.GraphModule, strict_config: bool) -> tuple[nn.Module, fx.GraphModule]:
    """The model without the layers of which nothing is left in the graph, and the graph with the names that it has there."""
    layers = removed_layers(pruned, model)
    if not layers:
        return model, pruned
    short = without_layers(model, layers)
    if _has_config(model):
        with _errors_of_the_config(model, strict_config):
            _check_config(model)
            fit_depth(short, model, layers)
    return short, with_names(pruned, layers)


def _check_arguments(pruned: Any, model: Any) -> None:
    if not isinstance(pruned, fx.GraphModule) or not has_provenance(pruned):
        raise InputError(f"`pruned` is a {type(pruned).__name__}; give what stp_fx.prune_graph returned")
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` is a {type(model).__name__}; give the torch.nn.Module that was traced")
    if isinstance(model, fx.GraphModule):
        raise InputError("`model` is a GraphModule: give the module that was traced")
    if provenance_of(pruned).masked is not None:
        raise InputError("`pruned` is masked: its tensors are as large as before. Remove what the masks cover first")
    check_basis(pruned, model)


def _arguments(pruned: fx.GraphModule, model: nn.Module, inputs: Any, kwargs: Mapping[str, Any] | None) -> Any:
    """All arguments of the forward on meta, and as they were given."""
    named = arguments_by_name(kwargs)
    if inputs is None and not named:
        found = recorded(pruned)
        return found, found
    given = bound_arguments(model, *by_name(model, inputs, named))
    return {k: mapped(v, lambda t: torch.empty_like(t, device="meta")) for k, v in given.items()}, given


def _put(model: nn.Module, numbers: Numbers) -> None:
    holders = holders_of(model)
    for (path, name), value in numbers.items():
        holders[path].put(name, value)


def _accept(check: Check, result: nn.Module, pruned: fx.GraphModule, given: Arguments, pattern: Arguments) -> None:
    """The weights as they are may make scores that differ by rounding alone; the random ones have shown that all is in place."""
    failure = check(result)
    if failure is not None and not agree_in_double(pruned, result, given, pattern):
        raise WriteBackError(
            f"with its own weights, {failure.text}; with random weights it agrees. Please report this", (failure.text,)
        )


@contextmanager
def _errors_of_the_config(model: nn.Module, strict: bool) -> Iterator[None]:
    """Without ``strict``, a config that cannot describe the result is a warning."""
    try:
        yield
    except WriteBackError as error:
        if strict:
            raise
        _log.warning("%s: save_pretrained and from_pretrained will not work: %s", type(model).__name__, error)


def _check_config(model: nn.Module) -> None:
    """A wrapper lends the config of the model within, which says nothing of what it adds."""
    if "config" in vars(model) or getattr(type(model), "config_class", None) is not None:
        return
    raise WriteBackError(
        f"{type(model).__name__} wraps a model whose {type(model.config).__name__} knows nothing of what was added, such as "
        "adapters: merge them into the weights first (`merge_and_unload()`), and prune what that gives"
    )


def _has_config(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("config", "save_pretrained", "from_pretrained"))
