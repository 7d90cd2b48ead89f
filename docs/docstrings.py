"""Docstrings as the reference shows them: roles become code, examples become blocks.

The docstrings are written to be read in an editor: ``:func:`name``` for what they refer to, ``::`` before literal text, doctests
as they are. Markdown has another word for each.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr|exc):`~?([^`]+)`")
_MARK = re.compile(r"(?m)^[ \t]*::[ \t]*$")


class Docstrings(Extension):
    """Rewrites every docstring once it is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring with roles as code, and doctests in fences of their own."""
    text = _MARK.sub("", _ROLE.sub(lambda m: f"`{m.group(1)}`", text))
    lines: list[str] = []
    indent: str | None = None
    for line in text.splitlines():
        if indent is None and line.lstrip().startswith(">>> "):
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}```pycon")
        elif indent is not None and not line.strip():
            lines.append(f"{indent}```")
            indent = None
        lines.append(line)
    if indent is not None:
        lines.append(f"{indent}```")
    return "\n".join(lines)
