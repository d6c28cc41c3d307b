"""The lists of methods and families: shown without torch, and true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vtp.export import declared, listed, listing


def test_what_is_listed_is_what_the_classes_say() -> None:
    said = listed.LISTED.read_text(encoding="utf-8") == listed.text_of(declared.listed())
    assert said, "export/listed.json is out of date; run: python -m vtp.export.declared"
    assert json.loads(listed.LISTED.read_text(encoding="utf-8")) == json.loads(json.dumps(declared.listed()))


@pytest.mark.parametrize(
    ("flag", "row"), [("--list-methods", "adaptprune"), ("--list-families", "llava_next")]
)
def test_lists_are_shown_without_torch(flag: str, row: str) -> None:
    blocked = "; ".join(
        f"sys.modules['{name}'] = None"
        for name in ("torch", "transformers", "onnx", "onnxruntime", "optimum")
    )
    command = f"from vtp.export.cli import main; sys.exit(main(['{flag}', '--markdown']))"
    script = f"import sys; {blocked}; {command}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\n| {row} | " in done.stdout


def test_a_new_file_is_listed_before_the_list_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its author sees it at once: the rows are then read from the classes."""
    old = tmp_path / "listed.json"
    old.write_text(listed.text_of({"files": ["pruners/none.py"], "methods": [], "families": []}))
    real = listed.files()
    monkeypatch.setattr(listed, "LISTED", old)
    monkeypatch.setattr(listed, "files", lambda: real)
    assert "adaptprune" in [row["method"] for row in listing.rows("methods")]


def test_the_pages_tables_are_written_with_the_list(tmp_path: Path) -> None:
    """docs/families.md is here, docs/methods.md is not: an installed vtp has neither."""
    page = tmp_path / "families.md"
    page.write_text(f"above\n{declared.BEGIN}\nold\n{declared.END}\nbelow\n")
    declared.write(tmp_path / "listed.json", tmp_path)
    assert (tmp_path / "listed.json").read_bytes() == listed.LISTED.read_bytes()
    table = listed.render(declared.families(), "markdown")
    assert page.read_text() == f"above\n{declared.BEGIN}\n{table}\n{declared.END}\nbelow\n"
    assert not (tmp_path / "methods.md").exists()
