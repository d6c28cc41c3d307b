"""What `make docs` adds to mkdocs: pages of the Python interface, links that leave docs/, columns as lists.

Pages in docs/ are written to be read in the repository. Here their relative links to files outside docs/ get
the repository's address, and file names in code type (`docs/serve.md`) become links to the site's pages.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
import re
from pathlib import Path
from typing import Any

import tomllib

try:
    from griffe import Extension
except ImportError:  # the functions below do without it
    Extension = object

LOG = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Pages of the Python interface: title, first words, what comes first, modules all of whose names follow.
PAGES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "runtime": (
        "Pipeline and results",
        "Open a bundle, ask, read the result: `from vtp.runtime import Pipeline`.",
        (
            "vtp.runtime.Pipeline",
            "vtp.runtime.generation.options.GenerateOptions",
            "vtp.runtime.Result",
            "vtp.runtime.Stream",
            "vtp.runtime.opening.Opening",
        ),
        ("vtp.runtime",),
    ),
    "scheduler": (
        "Scheduler",
        "Many requests at once, from threads and asyncio: `from vtp.runtime.scheduler import Scheduler`.",
        ("vtp.runtime.scheduler.Scheduler", "vtp.runtime.scheduler.Ticket"),
        ("vtp.runtime.scheduler",),
    ),
    "streams": (
        "Watcher",
        "A standing question about a camera or a stream: `from vtp.serve.streams import Watcher`.",
        ("vtp.serve.streams.Watcher", "vtp.serve.streams.open_source"),
        ("vtp.serve.streams",),
    ),
    "pruners": (
        "Pruners of your own",
        "What `--method ./mine.py:Mine` takes: a subclass of `Pruner`. CONTRIBUTING.md shows one.",
        ("vtp.export.pruners.base.Pruner", "vtp.export.pruners.ops"),
        (),
    ),
}
_ROW = re.compile(r"(?P<names>[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*)  +(?P<text>\S.*)")
_CODE = re.compile(
    r"(?P<fence>^```.*?^```)|`docs/(?P<page>[\w-]+\.md)`(?!\])", flags=re.DOTALL | re.MULTILINE
)


def _setup() -> Any:
    """setup.py, which rewrites links for the package page."""
    spec = importlib.util.spec_from_file_location("vtp_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source() -> str:
    """The repository's address, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["Source"])


def public_names(module: str) -> list[str]:
    """What a module lists in __all__, read without importing it."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    raise ValueError(f"{module} has no __all__")


def api_page(name: str) -> str:
    """The Markdown of one page of the Python interface, for mkdocstrings."""
    title, words, first, modules = PAGES[name]
    shown = dict.fromkeys(
        [*first, *(f"{module}.{public}" for module in modules for public in public_names(module))]
    )
    return "\n\n".join([f"# {title}", words, *(f"::: {path}" for path in shown)]) + "\n"


def with_named_pages(text: str, pages: set[str]) -> str:
    """`docs/NAME.md` in code type as a link to that page of the site."""

    def link(match: re.Match[str]) -> str:
        page = match["page"]
        return f"[{match[0]}]({page})" if page in pages else match[0]

    return _CODE.sub(link, text)


def site_link(target: str, address: str) -> str:
    """A link of a page in docs/, with the repository's address if it leaves docs/."""
    path, mark, anchor = target.partition("#")
    found = Path(os.path.normpath(DOCS / path))  # rooms may be links
    if not path or found == DOCS or DOCS in found.parents:
        return target
    if not (found.exists() and ROOT in found.parents):
        LOG.warning(
            "a page links to '%s', which is not a file of the repository", target
        )  # --strict fails by it
        return target
    named = found.relative_to(ROOT).as_posix() + mark + anchor
    return str(SETUP.in_repository(named, address, "main"))


def in_lists(docstring: str) -> str:
    """A docstring whose columns (a name, two spaces, its text, indented further lines) are Markdown lists."""
    lines: list[str] = []
    in_row = False
    for line in docstring.splitlines():
        row = _ROW.fullmatch(line)
        if row:
            if lines and lines[-1] and not in_row:
                lines.append("")
            names = ", ".join(f"`{name}`" for name in row["names"].split(", "))
            lines.append(f"- {names}: {row['text']}")
            in_row = True
        elif in_row and line.startswith("  "):
            lines[-1] += f" {line.strip()}"
        else:
            if in_row and line:
                lines.append("")
            in_row = False
            lines.append(line)
    return "\n".join(lines)


SETUP = _setup()


# -- what mkdocs and griffe call -----------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Set the repository's address; pages that the nav does not list go under More."""
    config.repo_url, config.repo_name = source(), "Repository"
    config.edit_uri = "edit/main/docs/"
    listed = re.findall(r"[\w-]+\.md", str(config.nav))
    more = sorted(path.name for path in DOCS.glob("*.md") if path.name not in listed)
    if more:
        config.nav = [*config.nav, {"More": more}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the Python interface."""
    from mkdocs.structure.files import File

    for name in PAGES:
        files.append(File.generated(config, f"api/{name}.md", content=api_page(name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Mend the links of a page of docs/."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    named = with_named_pages(markdown, {path.name for path in DOCS.glob("*.md")} - {page.file.src_uri})
    return str(SETUP.with_links(named, lambda target: site_link(target, config.repo_url)))


class Columns(Extension):  # type: ignore[misc]
    """Shows the columns of docstrings as lists."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = in_lists(obj.docstring.value)
