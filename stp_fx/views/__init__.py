"""Pictures of a network: data flow, coupling, and both (report, section 2.6); charts. All of plain data."""

from stp_fx.views.charts import chart
from stp_fx.views.drawing import Call, Drawing
from stp_fx.views.network import network
from stp_fx.views.picture import dot_text, draw, svg

__all__ = ["Call", "Drawing", "chart", "dot_text", "draw", "network", "svg"]
