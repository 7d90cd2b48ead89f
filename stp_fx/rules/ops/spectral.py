"""Fourier transforms and complex numbers."""

from __future__ import annotations

import torch

from stp_fx.rules.call import OpCall
from stp_fx.rules.domain import fixed_dim
from stp_fx.rules.literals import keeps
from stp_fx.rules.pointwise import pointwise
from stp_fx.rules.registry import rule
from stp_fx.rules.samples import arguments

__all__: list[str] = []

aten = torch.ops.aten

_FUNCTIONS = [
    getattr(torch.fft, f"{inverse}{kind}{rank}")
    for kind in ("fft", "rfft", "hfft")
    for inverse in ("", "i")
    for rank in ("", "2", "n")
]


def _transform(call: OpCall) -> None:
    """Every frequency is made of all positions, so none of the dimensions that are transformed can be shortened."""
    dims, out = call.dims(call["self"]), call.out
    over = {dim % len(dims) for dim in call["dim"]}
    for k in over:
        call.pin(dims[k], f"{call.name.strip('_')} runs over it")
    call.assign(out, tuple(fixed_dim(int(out.shape[k])) if k in over else dim for k, dim in enumerate(dims)))


rule(
    aten._fft_r2c.default,
    calls=[keeps(*_FUNCTIONS)],
    samples=lambda t: arguments(t(2, 3, 8), [2], 0, True),
)(_transform)
rule(
    aten._fft_c2r.default,
    samples=lambda t: arguments(t(2, 3, 5, dtype=torch.complex128), [2], 2, 8),
)(_transform)
rule(
    aten._fft_c2c.default,
    samples=lambda t: arguments(t(2, 3, 8, dtype=torch.complex128), [2], 0, True),
)(_transform)


@rule(aten.view_as_complex.default, calls=[keeps(torch.view_as_complex)], samples=lambda t: arguments(t(3, 5, 2)))
def _as_complex(call: OpCall) -> None:
    *dims, parts = call.dims(call["self"])
    call.pin(parts, "real and imaginary part")
    call.assign(call.out, tuple(dims))


@rule(
    aten.view_as_real.default,
    calls=[keeps(torch.view_as_real)],
    samples=lambda t: arguments(t(3, 5, dtype=torch.complex128)),
)
def _as_real(call: OpCall) -> None:
    call.assign(call.out, (*call.dims(call["self"]), fixed_dim(2)))


rule(
    aten.complex.default,
    aten.polar.default,
    samples=lambda t: arguments(t(3, 5), t(3, 5)),
)(pointwise)
rule(
    aten._conj.default,
    aten.resolve_conj.default,
    samples=lambda t: arguments(t(3, 5, dtype=torch.complex128)),
    keeps_zero=True,
)(pointwise)
