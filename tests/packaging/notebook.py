"""`make test-notebook`: runs the notebook as Jupyter does, in an empty folder, and prints what it prints."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs/examples/first_steps.ipynb"


def main() -> None:
    """Raises CellExecutionError for a cell that fails."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            print(output.get("text") or ", ".join(output.get("data", {})))


if __name__ == "__main__":
    main()
