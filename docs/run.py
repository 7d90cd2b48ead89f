"""Runs what the documentation says: the Python of a page, or the commands of all pages.

python docs/run.py python README.md       # its blocks in one namespace; what they print is held against the page
python docs/run.py update README.md       # writes what they print into the page; read the diff before committing it
python docs/run.py commands [PAGE ...]    # every command, long ones in the short form that the page gives
python docs/run.py check [PAGE ...]       # nothing runs; that every block and annotation can be read
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import os
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

from pages import ROOT, Block, Page, PageError, all_pages, matches, read

SECONDS = 300
"""How long one command may take; a page whose command takes longer needs a short form."""


def main(arguments: list[str]) -> int:
    """The exit status: 0 if everything ran and printed what the pages say."""
    if not arguments or arguments[0] not in ("python", "update", "commands", "check"):
        print(__doc__, file=sys.stderr)
        return 2
    what, *names = arguments
    paths = [Path(name).resolve() for name in names] or all_pages()
    try:
        pages = [read(path) for path in paths]
        if what == "commands":
            return run_commands(pages)
        for page in pages if what != "check" else ():
            run_python(page, update=what == "update")
    except PageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_python(page: Page, update: bool = False) -> None:
    """Runs a page's Python in an empty folder.

    Raises:
        PageError: a block prints something else than the ``text`` block after it, or does not end with the error of the ``pytb``
            block; whatever else a block raises comes through.
    """
    warnings.simplefilter("error")
    module = types.ModuleType("__main__")
    printed, outputs = "", []
    with tempfile.TemporaryDirectory() as folder, _working_in(folder), _as_main(module):
        for block, following in itertools.zip_longest(page.blocks, page.blocks[1:]):
            if block.kind == "python":
                fails = following is not None and following.kind == "pytb"
                printed = _run_block(page, block, module.__dict__, fails)
            elif block.kind in ("text", "pytb"):
                outputs.append((block, printed))
                if not update and not matches(block.code, printed, block.varies):
                    raise PageError(_difference(page, block, printed))
    if update:
        _write_outputs(page, outputs)


def run_commands(pages: list[Page]) -> int:
    """Runs every command once; says how long each took, and of those that failed what they printed."""
    done: set[tuple[str, Path]] = set()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for page in pages:
            place = _place(page, Path(folder))
            for command, short in page.commands:
                if (short, place) in done:
                    continue
                done.add((short, place))
                failed += not _run_command(page, command, short, place, Path(folder))
            for command, file in page.elsewhere:
                print(f"elsewhere  {page.name}: {command} (run by {file})", flush=True)
    print(f"{len(done)} commands run, {failed} failed")
    return int(failed > 0)


@contextlib.contextmanager
def _as_main(module: types.ModuleType) -> Iterator[None]:
    """A page is a program of its own: pickles and dataclasses look its classes up in ``__main__``."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        yield
    finally:
        sys.modules["__main__"] = before


def _run_block(page: Page, block: Block, namespace: dict[str, object], fails: bool) -> str:
    """The output of a block; of one that ``fails``, the last line of the traceback."""
    code = compile("\n" * (block.line - 1) + block.code, str(page.path), "exec")  # tracebacks show the page's own lines
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        if not fails:
            exec(code, namespace)
            return output.getvalue()
        try:
            exec(code, namespace)
        except Exception as error:
            return "".join(traceback.format_exception_only(error))
    raise PageError(f"{page.name}, line {block.line}: the block raises nothing, and the page shows an error after it")


def _difference(page: Page, block: Block, printed: str) -> str:
    wanted, got = block.code.strip("\n").splitlines(), [line.rstrip() for line in printed.strip("\n").splitlines()]
    diff = "\n".join(difflib.unified_diff(wanted, got, "on the page", "printed", lineterm=""))
    return f"{page.name}, line {block.line}: the block before prints something else (docs/run.py update writes it)\n{diff}"


def _write_outputs(page: Page, outputs: list[tuple[Block, str]]) -> None:
    """Puts what was printed in place of the ``text`` blocks that show something else."""
    lines = page.path.read_text().splitlines()
    for block, printed in reversed(outputs):
        if not matches(block.code, printed, block.varies):
            first = block.line - 1
            lines[first : first + block.code.count("\n")] = [line.rstrip() for line in printed.strip("\n").splitlines()]
    page.path.write_text("\n".join(lines) + "\n")


def _place(page: Page, folder: Path) -> Path:
    """Commands of a page that has files of its own run beside these, all others in the repository."""
    files = [block for block in page.blocks if block.kind == "file"]
    if not files:
        return ROOT
    place = folder / page.path.stem
    place.mkdir()
    for file in files:
        (place / file.title).write_text(file.code)
    return place


def _run_command(page: Page, command: str, short: str, place: Path, folder: Path) -> bool:
    paths = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    environment = {**os.environ, "PATH": paths, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        start = time.perf_counter()
        shell = ["bash", "-euo", "pipefail", "-c", short.replace("{tmp}", empty)]
        try:
            done = subprocess.run(
                shell, cwd=place, env=environment, timeout=SECONDS, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            status, output = -1, f"{_decoded(error.stdout)}\nno end within {SECONDS} s: give it a short form"
        seconds = time.perf_counter() - start
    as_what = "" if short == command else f" (as: {short})"
    print(f"{'ok' if status == 0 else 'FAILED':6} {seconds:5.1f} s  {page.name}: {command}{as_what}", flush=True)
    if status != 0:
        print("\n".join(output.splitlines()[-40:]), flush=True)
    return status == 0


def _decoded(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
