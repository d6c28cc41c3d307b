"""What tests of vtp-export share: copies of a tiny model, to be spoilt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def spoil(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> Callable[[Callable[[Path], object]], list[str]]:
    """Copies the smallest model, lets a function spoil it, and gives the command that would export it."""

    def make(change: Callable[[Path], object]) -> list[str]:
        folder = Path(shutil.copytree(model_folder("mha"), tmp_path / "model"))
        change(folder)
        (tmp_path / "work").mkdir()
        return [
            "--model",
            str(folder),
            "--verify",
            "none",
            "--method",
            "none",
            "-o",
            str(tmp_path / "work" / "out"),
        ]

    return make


# -- bad models ----------------------------------------------------------------------------------------------
