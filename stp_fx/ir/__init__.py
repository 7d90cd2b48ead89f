from stp_fx.ir.shapes import meta_twin
from stp_fx.ir.state import GraphState, attach_state, has_state, state_of
try:
    from stp_fx.ir.trace import trace
except ImportError:
    trace = None
