"""docs/examples/first_steps.ipynb runs from top to bottom: its code cells in order, without Jupyter."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtp.export.cli import build_parser

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/examples/first_steps.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
BIN = Path(sys.executable).parent


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def commands(cell: dict[str, Any]) -> list[list[str]]:
    """The words of a cell's lines that a shell runs."""
    return [shlex.split(line[1:]) for line in source(cell).splitlines() if line.startswith("!")]


def carried_out(cells: list[dict[str, Any]]) -> str:
    """What the cells print, one after the other, with the names of those before."""
    names: dict[str, Any] = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for cell in cells:
            exec(re.sub(r"(?m)^!.*\n?", "", source(cell)), names)
    return said.getvalue()


def is_export(cell: dict[str, Any]) -> bool:
    return "export" in cell["metadata"].get("tags", [])


def test_it_is_stored_without_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)


def test_its_links_lead_to_files() -> None:
    text = "".join(source(cell) for cell in CELLS if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


def test_its_export_makes_what_the_other_cells_open() -> None:
    (cell,) = [cell for cell in CODE if is_export(cell)]
    asked = [build_parser().parse_args(words[1:]) for words in commands(cell)]
    assert [words[0] for words in commands(cell)] == ["vtp-export"] * 2
    assert [(one.method, str(one.output)) for one in asked] == [
        ("adaptprune", "bundle"),
        ("none", "bundle-none"),
    ]
    opened = re.findall(r'(?:load|Path)\("(.*?)"\)', "".join(map(source, CODE)))
    assert set(opened) == {"bundle", "bundle-none"}


def test_every_other_cell_runs(
    exported: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tiny bundles of the same kinds; the notebook itself holds plain ONNX Runtime to the pipeline."""
    for name, folder in (("adaptprune", "bundle"), ("none", "bundle-none")):
        (tmp_path / folder).symlink_to(exported(name).folder)
    monkeypatch.chdir(tmp_path)
    said = carried_out([cell for cell in CODE if not is_export(cell)])
    assert re.findall(r"(?m)^ +(\d+) of 16 tokens: ", said) == ["4", "7"]
    assert re.findall(r"(?m)^ +(\d+) tokens: +[\d.]+ ms$", said) == ["4", "7", "16"]
    assert re.search(r"(?m)^pruner +keep_indices \[1, 7\], kept_hidden_states", said)


@pytest.mark.slow
def test_the_whole_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test-notebook` runs it as Jupyter does."""
    monkeypatch.chdir(tmp_path)
    for cell in CODE:
        for command in commands(cell):
            subprocess.run([str(BIN / command[0]), *command[1:]], check=True, capture_output=True)
    assert "blue VisualTokens(before=576, after=57)" in carried_out(CODE)
