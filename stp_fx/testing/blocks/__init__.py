"""Every kind of block that random networks are made of; importing this package registers them, the simplest first."""

from stp_fx.testing.blocks import norm, conv, linear, join, channels, spatial, attention, heads  # noqa: I001 - simplest first

__all__ = ["attention", "channels", "conv", "heads", "join", "linear", "norm", "spatial"]
