"""What tests of bundles on disk share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bundle(exported: Callable[[str], Any], tmp_path: Path) -> Path:
    """A copy of a bundle, to be spoilt."""
    return Path(shutil.copytree(exported("none").folder, tmp_path / "bundle"))
