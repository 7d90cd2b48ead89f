"""The command ``stp-fx``: analyse, prune, draw, compare and sweep from a shell."""

from stp_fx.cli.main import main

__all__ = ["main"]
