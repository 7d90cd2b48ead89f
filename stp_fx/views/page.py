"""The explorer's page: one HTML file of plain data, a template and the layout library dagre; it loads nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

__all__ = ["framed", "page"]

_SCRIPTS = ("dagre.min.js", "model.js", "layout.js", "picture.js", "panels.js", "main.js")
_HEIGHT = 720
"""Pixels of the frame in a notebook."""


def page(data: Mapping[str, Any]) -> str:
    """The page that shows ``data`` (:mod:`stp_fx.report.explored`).

    The data are JSON in an element of their own, without any ``<`` that a parser of HTML could take for a tag. The scripts write
    them as text, never as HTML, and the page's policy forbids it to load anything.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {
        "TITLE": html.escape(str(data.get("title", ""))),
        "STYLE": _part("page.css"),
        "DATA": text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
        "SCRIPTS": "\n".join(f"<script>\n{_part(name)}\n</script>" for name in _SCRIPTS),
    }
    pieces = _part("page.html").split("%%")
    return "".join(parts[piece] if k % 2 else piece for k, piece in enumerate(pieces))


def framed(page: str, height: int = _HEIGHT) -> str:
    """A page inside another, such as a notebook: its scripts run on their own, without access to what is around them."""
    return (
        f'<iframe srcdoc="{html.escape(page)}" width="100%" height="{height}" sandbox="allow-scripts allow-downloads" '
        'style="border: 1px solid #888" title="stp_fx explorer"></iframe>'
    )


def _part(name: str) -> str:
    return (resources.files("stp_fx.views") / "explorer" / name).read_text(encoding="utf-8")
