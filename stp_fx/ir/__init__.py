"""The IR: captured GraphModules with their recorded example, and what is needed to run them without data."""

from stp_fx.ir.call import Call
from stp_fx.ir.meta_run import MetaRun, run_for_shape
from stp_fx.ir.shapes import meta_like, meta_twin
from stp_fx.ir.state import GraphState, attach_state, example_of, has_state, state_of
from stp_fx.ir.trace import retrace, trace
from stp_fx.ir.verify import verify

__all__ = [
    "Call",
    "GraphState",
    "MetaRun",
    "attach_state",
    "example_of",
    "has_state",
    "meta_like",
    "meta_twin",
    "retrace",
    "run_for_shape",
    "state_of",
    "trace",
    "verify",
]
