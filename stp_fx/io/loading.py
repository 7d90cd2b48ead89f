"""``load``: the shortened network, built from the original one around a file's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from stp_fx.analysis.plan_json import decode_blocks
from stp_fx.errors import FileError, InputError, PlanError, StpFxError, translated
from stp_fx.io.contents import Contents, decode, is_whole
from stp_fx.io.files import read_file
from stp_fx.io.tensors import Stored, kind_of, stored_tensors, with_order
from stp_fx.ir import has_provenance, provenance_of, retrace
from stp_fx.ir.call import Call
from stp_fx.ir.provenance import floating_dtype, with_provenance
from stp_fx.paths import path_of
from stp_fx.rewrite.basis.record import replay
from stp_fx.rewrite.bias import restore_biases
from stp_fx.rewrite.removal import mask, remove
from stp_fx.rewrite.slicing import copied
from stp_fx.rewrite.without_blocks import without_blocks
from stp_fx.selection import PrunePlan

__all__ = ["load", "recorded_call"]


def load(path: Any, model: nn.Module) -> fx.GraphModule:
    """The network that :func:`stp_fx.save` wrote, as a new GraphModule; ``model`` stays as it was.

    Values, dtypes and modes are the file's, devices are those of ``model`` (the CPU for a model on the meta device). Nothing in
    the file is run: it is read as safetensors and JSON, and checked against its checksum and against ``model``.

    Args:
        path: a file that :func:`stp_fx.save` wrote.
        model: the original network, with any weights: a module, which is captured as the saved one was (with an example of
            the recorded shapes), or what :func:`stp_fx.trace` made of it.

    Raises:
        InputError: ``model`` is no module, or is masked.
        FileError: no such file, not one of ours, damaged, of a newer format, or made from another network: names the first
            tensor that differs.
    """
    source = path_of(path)
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` is a {type(model).__name__}; give the original network, or a trace of it")
    if has_provenance(model) and provenance_of(model).masked is not None:  # type: ignore[arg-type]
        raise InputError("`model` is masked: give the original network (stp_fx.passes.UnmaskChannels takes masks out)")
    metadata, tensors = read_file(source)
    try:
        contents = decode(metadata)
        if not is_whole(metadata, tensors):
            raise FileError("damaged: its contents do not have the checksum that was written with them")
        result = _rebuilt(contents, model, _parameters_dtype(contents, tensors))
        _fill(result, contents, tensors)
        _set_modes(result, contents)
    except StpFxError as error:
        raise FileError(f"{source!r} cannot be loaded; it is {error}" if isinstance(error, FileError) else
                        f"{source!r} cannot be loaded into {type(model).__name__}: {error}") from error  # fmt: skip
    return result


def recorded_call(path: Any) -> Call | None:
    """How the network in a file that :func:`stp_fx.save` wrote was captured; None if its example could not be recorded.

    Raises:
        FileError: no such file, or not one of ours.
    """
    source = path_of(path)
    metadata, _ = read_file(source)
    try:
        call = decode(metadata).call
    except FileError as error:
        raise FileError(f"{source!r} cannot be loaded; it is {error}") from error
    return None if call is None or call.args is None else call


def _parameters_dtype(contents: Contents, tensors: Mapping[str, torch.Tensor]) -> torch.dtype | None:
    """The dtype of the first floating parameter of the file."""
    known = (tensors[name] for name in contents.original if name in tensors)
    return next((tensor.dtype for tensor in known if tensor.is_floating_point()), None)


def _rebuilt(contents: Contents, model: nn.Module, dtype: torch.dtype | None) -> fx.GraphModule:
    """The network with the file's structure and ``model``'s values; ``dtype`` is that of the file's parameters.

    Raises:
        StpFxError: what the file says does not fit ``model``.
    """
    with translated(FileError, "no description of a network that can be built: {}".format):  # absurd sizes, deep inside of torch
        graph = _graph_of(contents, model, dtype)
        turned = provenance_of(graph).turned != contents.turned
        graph = copied(graph) if contents.added or contents.basis or turned else graph
        if provenance_of(graph).basis != contents.basis:
            replay(graph, contents.basis)
        if turned:
            with_provenance(graph, turned=contents.turned)
        graph = _without_blocks(graph, contents.plan)
        _check_same(contents, stored_tensors(graph), graph)
        restore_biases(graph, contents.added)
        original = {(name, dim): size for name, sizes in contents.original.items() for dim, size in enumerate(sizes)}
        result = remove(graph, _plan(contents.plan, original).without_blocks())
        if contents.masked is not None:
            left = {(n, dim): size for n, s in stored_tensors(result).items() for dim, size in enumerate(s.tensor.shape)}
            result = mask(result, _plan(contents.masked, left))
        return result


def _without_blocks(graph: fx.GraphModule, plan: str) -> fx.GraphModule:
    try:
        blocks = decode_blocks(plan)
        return without_blocks(graph, blocks) if blocks else graph
    except PlanError as error:
        raise FileError(f"damaged, or of another network: its plan cannot be carried out: {error}") from error


def _plan(text: str, axes: Mapping[tuple[str, int], int]) -> PrunePlan:
    try:
        return PrunePlan.from_json(text, axes)
    except PlanError as error:
        raise FileError(f"damaged: its plan cannot be read: {error}") from error


def _graph_of(contents: Contents, model: nn.Module, dtype: torch.dtype | None) -> fx.GraphModule:
    if has_provenance(model):
        return model  # type: ignore[return-value]
    if contents.call is None:
        raise InputError("the file does not say how the network was captured: give stp_fx.trace(model, example_inputs)")
    for name, each in stored_tensors(model).items():  # another network may not even run on the recorded example
        _check_sizes(name, contents.original.get(name), each)
    return retrace(model, contents.call.following(dtype, floating_dtype(model)))


def _check_same(contents: Contents, ours: Mapping[str, Stored], graph: fx.GraphModule) -> None:
    """The original network of the file is this one.

    Raises:
        FileError: the first tensor that differs.
    """
    pruned = provenance_of(graph).plan is not None and bool(provenance_of(graph).plan.kept)
    hint = " (the given graph has been pruned already: give the original one)" if pruned else ""
    for name, sizes in contents.original.items():
        if name not in ours:
            raise FileError(f"of another network: this one has no tensor {name!r}{hint}")
        _check_sizes(name, sizes, ours[name], hint)
    for name, each in ours.items():
        if name not in contents.original:
            raise FileError(f"of another network: that one had no tensor {name!r}{hint}")
        theirs = tuple(other for other, first in contents.ties.items() if first == name)
        if set(theirs) != set(each.names[1:]):
            differs = sorted(set(theirs) ^ set(each.names[1:]))[0]
            raise FileError(f"of another network: {differs!r} is tied to {name!r} in only one of the two")
    lost = next((name for name in contents.ties.values() if name not in ours and name not in contents.added), None)
    if lost is not None:
        raise FileError(f"damaged: a tensor is tied to {lost!r}, which there is not")


def _check_sizes(name: str, sizes: tuple[int, ...] | None, ours: Stored, hint: str = "") -> None:
    actual = tuple(ours.tensor.shape)
    if sizes is not None and actual != sizes:
        raise FileError(f"of another network: {name!r} had the sizes {list(sizes)} and has {list(actual)} here{hint}")


def _fill(result: fx.GraphModule, contents: Contents, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives the new network the file's values.

    Raises:
        FileError: a tensor is missing, not known, or of another size or kind.
    """
    places = stored_tensors(result)
    for name in (*places, *tensors):
        if name not in places or name not in tensors:
            raise FileError(f"damaged: {'it lacks tensor' if name in places else 'it holds an unknown tensor'} {name!r}")
    for field in ("complex", "order", "frozen"):
        for name in getattr(contents, field):
            if name not in places or (field == "frozen" and not places[name].is_parameter):
                raise FileError(
                    f"damaged: {field!r} names {name!r}, which is no {'parameter' if field == 'frozen' else 'tensor'}"
                )
    complex_names, frozen = set(contents.complex), set(contents.frozen)
    for name, place in places.items():
        value = _value(name, tensors[name], name in complex_names)
        if value.shape != place.tensor.shape:
            raise FileError(f"damaged: {name!r} is {list(value.shape)}, the plan leaves {list(place.tensor.shape)}")
        if kind_of(value) != kind_of(place.tensor):
            raise FileError(f"of another network: {name!r} is {value.dtype}, and {place.tensor.dtype} here")
        trained = place.is_parameter and name not in frozen
        if trained and kind_of(value) not in ("floating", "complex"):
            raise FileError(f"damaged: {name!r} is {value.dtype}, which has no gradient, and is not frozen")
        device = torch.device("cpu") if place.tensor.is_meta else place.tensor.device
        _put(place, with_order(value, contents.order.get(name), device), trained)


def _value(name: str, stored: torch.Tensor, pairs: bool) -> torch.Tensor:
    if not pairs:
        return stored
    if stored.dtype not in (torch.float32, torch.float64) or stored.dim() == 0 or stored.shape[-1] != 2:
        raise FileError(f"damaged: {name!r} is no tensor of pairs of real numbers")
    return torch.view_as_complex(stored.contiguous())


def _put(place: Stored, value: torch.Tensor, trained: bool) -> None:
    old = place.tensor
    old.grad = None
    if not old.is_meta:
        old.data = value  # the same object, which recurrent layers hold beside the parameter
        old.requires_grad_(trained)
        return
    new = nn.Parameter(value, requires_grad=trained) if place.is_parameter else value
    for module, name in place.places:
        setattr(module, name, new)


def _set_modes(result: fx.GraphModule, contents: Contents) -> None:
    modules = dict(result.named_modules())
    unknown = next((name for name in contents.other if name not in modules), None)
    if unknown is not None:
        raise FileError(f"of another network: this one has no module {unknown!r}")
    for name, module in modules.items():
        module.training = contents.training != (name in contents.other)
