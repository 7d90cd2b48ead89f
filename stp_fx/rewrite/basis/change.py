"""The work of the passes: every stream of a graph is prepared, and rotated, or left as it is with the reason."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from stp_fx.errors import NothingToRotateError, RewriteError
from stp_fx.ir.provenance import floating_dtype, provenance_of, with_provenance
from stp_fx.measure.second_moments import second_moments
from stp_fx.rewrite.basis.affine import fold_norms
from stp_fx.rewrite.basis.centre import centre
from stp_fx.rewrite.basis.heads import find_heads, rotate_heads
from stp_fx.rewrite.basis.layer_scale import fold_layer_scales
from stp_fx.rewrite.basis.principal import principal_basis
from stp_fx.rewrite.basis.probe import Probe, same
from stp_fx.rewrite.basis.record import record_of
from stp_fx.rewrite.basis.rotate import check_rotation, rotate
from stp_fx.rewrite.basis.streams import Stream, find_streams, pinned_streams
from stp_fx.rewrite.basis.written_norms import fuse_norm, written_norms
from stp_fx.rewrite.slicing import copied
from stp_fx.text import listed

__all__ = ["Changed", "layer_norms_to_rms_norms", "rotated_heads", "rotated_residuals"]

_log = logging.getLogger("stp_fx.basis")


@dataclasses.dataclass(frozen=True, eq=False)
class Changed:
    """``graph`` is the result; ``done`` names the streams that were changed, ``refused`` the others with the reasons."""

    graph: fx.GraphModule
    done: tuple[str, ...]
    refused: dict[str, str]

    @property
    def reasons(self) -> str:
        """Why streams were left as they are, in words."""
        return listed([f"the channels of '{name}': {why}" for name, why in self.refused.items()], 6)


def layer_norms_to_rms_norms(gm: fx.GraphModule) -> Changed:
    """Every stream whose LayerNorms can be RMSNorms, made so in a copy."""

    def step(result: fx.GraphModule, stream: Stream) -> bool:
        if all(norm.kind == "rms" for norm in stream.norms):
            return False
        _prepare(result, stream)
        return True

    return _each_stream(gm, step)


def rotated_residuals(gm: fx.GraphModule, calibration: Iterable[Any] | torch.Tensor | None) -> Changed:
    """Every stream that can be rotated, rotated into its principal components in a copy; LayerNorms become RMSNorms."""

    def step(result: fx.GraphModule, stream: Stream) -> bool:
        _prepare(result, stream)
        stream = _again(result, stream)
        touched = check_rotation(stream, Probe(result))
        rotate(result, touched, principal_basis(_as_before(copied(result), gm), stream, touched, calibration))
        return True

    return _each_stream(gm, step)


def rotated_heads(gm: fx.GraphModule, calibration: Iterable[Any] | torch.Tensor | None) -> Changed:
    """Every attention and every chain of two linear layers that lets matrices pass, in singular vectors, in a copy."""
    result = copied(gm).double()
    probe = Probe(result)
    done: list[str] = []
    refused: dict[str, str] = {}
    found = find_heads(result, probe)
    wanted = {block: place for heads in found for block, place in heads.observed().items()} if calibration is not None else {}
    observed = {} if calibration is None else second_moments(gm, calibration, wanted, "finding the basis of heads")
    for heads in found:
        try:
            tensors = rotate_heads(heads, observed)
        except NothingToRotateError as error:
            if heads.carrier is None or len(heads.carrier.positions) > 1:  # else the hidden layer of an MLP
                refused[heads.group.name] = str(error)
            _log.debug("%s", error)
            continue
        with torch.no_grad():
            for name, value in tensors.items():
                result.get_parameter(name).copy_(value)
        done.append(heads.group.name)
    if not done:
        return Changed(gm, (), refused)
    _check_same_function(probe.outputs, Probe(result).outputs)
    return Changed(_turned(_as_before(result, gm), done), tuple(done), refused)


def _prepare(gm: fx.GraphModule, stream: Stream) -> None:
    """Makes the norms of a stream RMSNorms without scale and shift, and its layer scales ones, in place."""
    if fold_layer_scales(gm, stream, Probe(gm)):
        stream = _again(gm, stream)
    untied = fold_norms(gm, stream, Probe(gm))
    if untied is not None:
        stream = _again(gm, stream)
    converted = centre(gm, stream, Probe(gm)) if any(norm.kind == "layer" for norm in stream.norms) else []
    records = (*map(record_of, untied or ()), *map(record_of, converted))
    with_provenance(gm, basis=(*provenance_of(gm).basis, *records))


def _again(gm: fx.GraphModule, stream: Stream) -> Stream:
    """The same stream after a rewrite."""
    return next(each for each in find_streams(gm) if each.name == stream.name)


def _each_stream(gm: fx.GraphModule, step: Callable[[fx.GraphModule, Stream], bool]) -> Changed:
    """Every step works in double precision on a copy, so that weights are rounded once."""
    done: list[str] = []
    refused: dict[str, str] = {}
    result = copied(gm).double()
    before = _fused(result)
    refused |= pinned_streams(result)
    for name in [stream.name for stream in find_streams(result)]:
        trial = copied(result)
        stream = next(each for each in find_streams(trial) if each.name == name)
        try:
            if step(trial, stream):
                result = trial
                done.append(name)
        except NothingToRotateError as error:
            refused[name] = str(error)
            _log.info("the channels of '%s' keep their basis: %s", name, error)
    if not done:
        return Changed(gm, (), refused)
    _check_same_function(before, Probe(result).outputs)
    return Changed(_turned(_as_before(result, gm), done), tuple(done), refused)


def _turned(gm: fx.GraphModule, names: Iterable[str]) -> fx.GraphModule:
    """``gm``, which records that the channels of these groups are combinations of earlier ones."""
    with_provenance(gm, turned=(*provenance_of(gm).turned, *names))
    return gm


def _as_before(result: fx.GraphModule, gm: fx.GraphModule) -> fx.GraphModule:
    """``result`` with the dtypes that ``gm`` has, in place."""
    dtypes = {name: t.dtype for name, t in (*gm.named_parameters(), *gm.named_buffers())}
    usual = floating_dtype(gm)
    for name, tensor in (*result.named_parameters(), *result.named_buffers()):
        wanted = dtypes.get(name, usual if tensor.is_floating_point() else tensor.dtype)
        tensor.data = tensor.data.to(wanted)
    return result


def _fused(gm: fx.GraphModule) -> list[torch.Tensor]:
    """Makes calls of the norms that ``gm`` has written out, in place; gives the outputs, in which less is cast than before."""
    probe = Probe(gm)
    norms = written_norms(probe)
    if not norms:
        return probe.outputs
    for norm in norms:
        fuse_norm(gm, norm)
    gm.recompile()
    with_provenance(gm, basis=(*provenance_of(gm).basis, *map(record_of, norms)))
    after = Probe(gm).outputs
    _check_same_function([one.float() if one.is_floating_point() else one for one in probe.outputs], after)
    return after


def _check_same_function(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    for one, other in zip(before, after, strict=True):
        if not same(one, other.to(one.dtype)):
            raise RewriteError(
                "the change of basis changes what the network computes; the input graph is unchanged. Please report this, and "
                "go on without `basis`"
            )
