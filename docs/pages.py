"""The parts of a page that can be run: its Python with its output, its commands, and how a long command is run in short.

Every fenced block names its language. The ``python`` blocks of a page run one after another in one namespace; a ``text``
block right after one is what it prints (``...`` stands for anything), a ``pytb`` block the error that it ends with. A ``python``
block with a ``title="name.py"`` is a file instead. The lines of ``sh`` blocks, and inline code that begins like a command, are
the page's commands. HTML comments hold the notes for this program:

    <!-- python            statements that run in the page's namespace
    <!-- varies -->        the next output depends on the machine: all but its numbers is compared
    <!-- short             a line each: `command => what the check runs in its place`, {tmp} being an empty folder
    <!-- elsewhere         a line each: `command => the file of the repository that runs it`
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

__all__ = ["ROOT", "Block", "Page", "PageError", "all_pages", "matches", "read"]

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("make", "python", "pip", "torchrun", "stp-fx", "mkdocs", "pre-commit", "pytest", "bash")
"""The first words that make an inline code span a command."""

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)(?P<rest>.*)$")
_COMMENT = re.compile(r"<!--[ \t]*(python|varies|short|elsewhere)\b[ \t]*\n?(.*?)-->", re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_NUMBER = re.compile(r"\d[\d,]*(\.\d+)?(e[-+]\d+)?")

_RULE = re.compile("[━─═-]+")


class PageError(Exception):
    """A page that is not written as the check expects; says where and what."""


@dataclasses.dataclass(frozen=True)
class Block:
    """``kind``: python, file, text or sh. ``line``: the number of its first line of code in the page."""

    kind: str
    code: str
    line: int
    title: str = ""
    varies: bool = False


@dataclasses.dataclass(frozen=True)
class Page:
    """A page's runnable parts in order; ``commands`` with what is run for them, ``elsewhere`` with the file that runs them."""

    path: Path
    blocks: tuple[Block, ...]
    commands: tuple[tuple[str, str], ...]
    elsewhere: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT)) if self.path.is_relative_to(ROOT) else self.path.name

    @property
    def has_python(self) -> bool:
        return any(block.kind == "python" for block in self.blocks)


def all_pages() -> list[Path]:
    """The README and every page under ``docs``."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read(path: Path) -> Page:
    """Reads a page.

    Raises:
        PageError: a fence without a language or end, an annotation that fits no command of the page or says nothing, or a
            file named in ``elsewhere`` that does not have the command.
    """
    text = path.read_text()
    blocks, prose = _blocks(text, path)
    notes = {kind: _table(text, kind, path) for kind in ("short", "elsewhere")}
    found = dict.fromkeys(line for block in blocks if block.kind == "sh" for line in _command_lines(block.code))
    found.update(dict.fromkeys(code for code in _INLINE.findall(_COMMENT.sub("", prose)) if _is_command(code)))
    for kind, table in notes.items():
        for command in table:
            if command not in found:
                raise PageError(f"{path}: the annotation `{kind}` is for {command!r}, which the page does not have")
    for command, place in notes["elsewhere"].items():
        file = ROOT / place
        if not file.is_file() or command not in file.read_text():
            raise PageError(f"{path}: {command!r} should be run by {place}, which does not have it")
    here = tuple((command, notes["short"].get(command, command)) for command in found if command not in notes["elsewhere"])
    return Page(path, tuple(blocks), here, tuple(notes["elsewhere"].items()))


def matches(expected: str, printed: str, varies: bool = False) -> bool:
    """Whether ``printed`` is what a page shows: line by line, without trailing blanks, ``...`` standing for anything."""
    wanted, got = _normal(expected, varies), _normal(printed, varies)
    pattern = ".*".join(re.escape(part) for part in wanted.split("..."))
    return re.fullmatch(pattern, got, re.DOTALL) is not None


def _normal(text: str, varies: bool) -> str:
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    if not varies:
        return "\n".join(lines)
    # Columns, and the rules of tables, move with the width of numbers.
    return "\n".join(" ".join(_RULE.sub("-", _NUMBER.sub("#", line)).split()) for line in lines)


def _blocks(text: str, path: Path) -> tuple[list[Block], str]:
    """The blocks of a page, hidden ones too, and the text around them."""
    starts = [(text.count("\n", 0, m.start()), m) for m in _COMMENT.finditer(text)]
    hidden = {line: m for line, m in starts if m.group(1) == "python"}
    varying = {line for line, m in starts if m.group(1) == "varies"}
    found: list[Block] = []
    prose: list[str] = []
    varies, lines, at = False, text.splitlines(), 0
    while at < len(lines):
        if at in hidden:
            found.append(Block("python", hidden[at].group(2), at + 2))
            at += hidden[at].group(0).count("\n") + 1
            continue
        varies = varies or at in varying
        fence = _FENCE.match(lines[at])
        if fence is None:
            prose.append(lines[at])
            at += 1
            continue
        end = next((k for k in range(at + 1, len(lines)) if lines[k].strip() == "```"), None)
        if end is None or not fence["language"]:
            raise PageError(f"{path}, line {at + 1}: a fenced block needs a language (python, text, sh ...) and an end")
        indent = len(fence["indent"])
        title = re.search(r'title="([^"]+)"', fence["rest"])
        kind = "file" if fence["language"] == "python" and title else fence["language"]
        code = "".join(line[indent:] + "\n" for line in lines[at + 1 : end])
        found.append(Block(kind, code, at + 2, title[1] if title else "", varies and kind == "text"))
        varies = varies and kind != "text"
        at = end + 1
    return found, "\n".join(prose)


def _table(text: str, kind: str, path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    for note in _COMMENT.finditer(text):
        if note.group(1) != kind:
            continue
        for line in filter(None, map(str.strip, note.group(2).splitlines())):
            command, arrow, instead = (part.strip() for part in line.partition("=>"))
            if not arrow or not instead:
                raise PageError(f"{path}: {line!r} in a comment `{kind}`; write `command => {kind}`")
            table[command] = instead
    return table


def _command_lines(code: str) -> list[str]:
    """Commands of a shell block, without comments; lines that end in a backslash are joined."""
    joined = re.sub(r"\\\n\s*", "", code)
    return [line for line in (re.sub(r"(^|\s+)#.*$", "", line).strip() for line in joined.splitlines()) if line]


def _is_command(code: str) -> bool:
    words = code.split()
    return len(words) > 1 and words[0] in PROGRAMS and not code.endswith(("...", ":"))
