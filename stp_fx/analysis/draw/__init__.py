"""Pictures of a channel graph: data flow, coupling, and both (report, section 2.6)."""

from stp_fx.analysis.draw.charts import chart
from stp_fx.analysis.draw.network import network
from stp_fx.analysis.draw.picture import dot_text, draw, svg

__all__ = ["chart", "dot_text", "draw", "network", "svg"]
