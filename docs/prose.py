"""Check the words of the project: docstrings, comments, messages and pages keep to one glossary.

``make lint`` runs it: ``python docs/prose.py [paths]`` prints ``file:line: the words: what to write instead`` and exits
with 1 if it finds any. ``RULES`` is the list of the words, ``ALLOWED`` that of the phrases which look alike and mean
something else; each of these has a reason. Code is not prose: names, inline code and fenced blocks are left out.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATHS = ("stp_fx", "docs", "examples", "benchmarks", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
# Files that programs write, with the words of their makers: the tables of benchmarks.
MADE = ("benchmarks/results",)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern of words to avoid, and the words to write instead."""

    pattern: str
    instead: str


RULES = (
    Rule(r"\bstoreys?\b", "layer of the package"),
    Rule(r"\bsites?\b", "activation input of a layer"),
    Rule(r"\bgone\b", "removed"),
    Rule(r"\bdead\b", "masked, removed, or unread"),
    Rule(r"\b(lives?|live) (and|or) dies?\b", "kept or removed together"),
    Rule(r"\breaders?\b", "consumer"),
    Rule(r"\b(speaks?|spoke|speaking) of\b", "names, covers, contains"),
    Rule(r"\b(what|that which|as|be|is|are|was|were|it) (is |was |are )?said\b", "reported, documented, given"),
    Rule(r"\bmixtures?\b", "combination (of channels)"),
    Rule(r"\b(of|to|in|from|with|by|at|for) which (it|they|he|one) (does|do)\b", "two sentences"),
    Rule(r"\bwent another way\b", "took another branch"),
    Rule(r"\bfor want of\b", "without, because there is no"),
    Rule(r"\bhe who\b|\bwhoso\b|\bthereof\b|\bwherein\b|\bwhence\b|\bwhereof\b", "plain words"),
    Rule(r"\bwhat (goes|stays|went|remains)\b", "the removed / the kept channels"),
    Rule(r"(?:^|[.:;!]\s+|\n\s*\n\s*|[-*] +)What (?![^.]*\?)", "a noun as the subject, not a clause with 'what'"),
)

# What looks like a word of RULES and is not one. A phrase, and the reason why it may stand.
ALLOWED = {
    r"\bdead[- ]code\b": "a compiler's term",
    r"\bdead ReLUs?\b|\bdead neurons?\b": "a term of the field",
    r"\b(documentation|web|project)'?s? site\b|\bout/site\b|\bsite-packages\b|\bthe site\b": "a site of pages",
    r"\bmixtures? of experts\b": "a term of the field",
    r"\bscreen[- ]readers?\b": "a program that reads pages aloud",
    r"\breaders? of (the|this) page\b": "a person",
    r"\bbe said about\b": "the ordinary verb",
}

_ALLOWED = re.compile("|".join(ALLOWED), re.IGNORECASE)
_CODE = re.compile(r"``[^`]+``|`[^`\n]+`|https?://\S+|\[[^\]\n]*\]\([^)\n]*\)(?<=\.md\))|:\w+:`[^`]*`")
_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[ \t]*$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Finding:
    path: Path
    line: int
    words: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.words!r}: {self.instead}"


def findings(text: str, path: Path, first_line: int = 1) -> list[Finding]:
    """The words of ``text`` that a rule forbids; ``first_line`` is where it begins in its file."""
    blank = _ALLOWED.sub(_blanked, _CODE.sub(_blanked, text))
    found = []
    for rule in RULES:
        flags = 0 if "What" in rule.pattern else re.IGNORECASE
        for match in re.finditer(rule.pattern, blank, flags):
            words = " ".join(match[0].strip(" .:;!-*\n").split())
            at = match.end() - len(match[0].lstrip(" .:;!-*\n"))
            found.append(Finding(path, first_line + blank.count("\n", 0, at), words, rule.instead))
    return found


def prose_of(path: Path) -> Iterator[tuple[str, int]]:
    """The prose of a file, piece by piece, each with the line at which it begins."""
    source = path.read_text()
    if path.suffix == ".md":
        yield _COMMENT.sub(_blanked, _FENCE.sub(_blanked, source)), 1
        return
    yield from _comments(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield _without_examples(node.value), node.lineno


def files(paths: list[str]) -> list[Path]:
    """The Python files and pages of ``paths``, which are relative to the repository's root."""
    found: list[Path] = []
    for path in (ROOT / each for each in paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [each for each in inside if each.suffix in (".py", ".md")]
    made = [ROOT / each for each in MADE]
    return [each for each in found if each != Path(__file__) and not any(folder in each.parents for folder in made)]


def main(paths: list[str]) -> int:
    found = [each for path in files(paths or list(PATHS)) for text, line in prose_of(path) for each in findings(text, path, line)]
    for each in sorted(found, key=lambda finding: (str(finding.path), finding.line)):
        print(dataclasses.replace(each, path=each.path.relative_to(ROOT)))
    if found:
        print(f"{len(found)} places are not in the words of the glossary: docs/prose.py lists them, and what may stand.")
    return 1 if found else 0


def _comments(source: str) -> Iterator[tuple[str, int]]:
    """Comments; those on successive lines of their own are one text."""
    text, start, last = "", 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, words = token.start[0], token.string.lstrip("#").strip()
        if line == last + 1:
            text += "\n" + words
        else:
            if text:
                yield text, start
            text, start = words, line
        last = line
    if text:
        yield text, start


def _without_examples(docstring: str) -> str:
    return re.sub(r"^\s*(>>>|\.\.\.).*$", _blanked, docstring, flags=re.MULTILINE)


def _blanked(match: re.Match[str]) -> str:
    """As many lines as before, without words."""
    return "x" + "\n" * match[0].count("\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
