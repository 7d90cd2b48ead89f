"""The IR: captured GraphModules with their recorded example, and what is needed to run them without data."""

from stp_fx.ir.call import Call
from stp_fx.ir.memo import remembered
from stp_fx.ir.meta_run import MetaRun, run_for_shape
from stp_fx.ir.provenance import Provenance, attach_provenance, example_of, has_provenance, provenance_of, with_provenance
from stp_fx.ir.shapes import meta_like, meta_twin
from stp_fx.ir.trace import retrace, trace
from stp_fx.ir.verify import verify

__all__ = [
    "Call",
    "MetaRun",
    "Provenance",
    "attach_provenance",
    "example_of",
    "has_provenance",
    "meta_like",
    "meta_twin",
    "provenance_of",
    "remembered",
    "retrace",
    "run_for_shape",
    "trace",
    "verify",
    "with_provenance",
]
