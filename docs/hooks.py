"""Brings pages into the site that live elsewhere in the repository: README, ARCHITECTURE and the like, and what was measured.

They are read where they are, so there is no second copy to go stale; only the targets of their links change.
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_DIRECTIVE = re.compile(r"(?m)^::: (\S+)")
_log = logging.getLogger("mkdocs.hooks.reference")
_UP = re.compile(r"(?<=\]\()\.\./((?:\.\./)*)benchmarks/results/")
_LINK = re.compile(r"(?<=\]\()(?!\w+://|#)([^)\s]+)(?=\))")


def on_config(config: Any) -> Any:
    """mkdocs has read its configuration: fills in the section of measured results, under their own headings."""
    results = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    titles = {path.name: path.read_text().partition("\n")[0].lstrip("# ") for path in results}
    for section in config.nav:
        if "Measured" in section:
            section["Measured"] = [{title: f"results/{name}"} for name, title in titles.items()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """mkdocs asks for the list of files: adds ours."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=_LINK.sub(_in_site, (ROOT / source).read_text())))
    for result in sorted((ROOT / "benchmarks" / "results").iterdir()):
        if result.suffix == ".md":
            files.append(File.generated(config, f"results/{result.name}", content=result.read_text()))
        elif result.suffix in (".png", ".svg"):
            files.append(File.generated(config, f"results/{result.name}", abs_src_path=str(result)))
    files.append(File.generated(config, "LICENSE.txt", content=(ROOT / "LICENSE").read_text()))
    return files


def _in_site(link: re.Match[str]) -> str:
    """Where a file of the repository is in the site."""
    target, hash_sign, anchor = link.group(1).partition("#")
    if target in PAGES:
        target = PAGES[target]
    elif target.rstrip("/") == "benchmarks/results":
        target = "results/engine.md"
    elif target.startswith("benchmarks/results/"):
        target = target.removeprefix("benchmarks/")
    elif target == "LICENSE":
        target = "LICENSE.txt"
    return target.removeprefix("docs/") + hash_sign + anchor


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of pages under docs/ to measured results, which lie one folder higher in the repository than in the site."""
    return _UP.sub(r"\1results/", markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """A public name that the reference does not show (it has no docstring, or a module has its name) is a warning."""
    for name in _DIRECTIVE.findall(page.markdown) if page.file.src_uri.startswith("reference/") else ():
        shown = set(re.findall(r'id="([\w.]+)"', output))
        for public in _public_names(name):
            if not any(each.startswith("stp_fx.") and each.endswith("." + public) for each in shown):
                _log.warning(f"{page.file.src_uri}: {name}.{public} is public but not shown: give it a docstring")
    return output


def _public_names(module: str) -> list[str]:
    """``__all__`` of a module, without its submodules; read from its source, so that nothing has to be imported."""
    place = ROOT.joinpath(*module.split("."))
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not source.is_file():
        return []  # a function or class
    for statement in ast.parse(source.read_text()).body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            return [name for name in ast.literal_eval(statement.value) if not _is_module(place, name)]
    raise ValueError(f"{source} has no __all__")


def _is_module(place: Path, name: str) -> bool:
    shared = ROOT / "stp_fx" / "training"
    folders = (place, shared) if place.is_dir() else ()
    parts = [folder / name for folder in folders if (folder / name).is_dir() or (folder / f"{name}.py").is_file()]
    return any(not _defines(part, name) for part in parts)


def _defines(module: Path, name: str) -> bool:
    """Whether a module holds a function of its own name, which then is what is public."""
    source = module.with_suffix(".py")
    return source.is_file() and f"def {name}(" in source.read_text()
