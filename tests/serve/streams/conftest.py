"""What tests of streams share: a bundle of the built-in model, and a tiny one, opened once a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline

from ...once import Once


@pytest.fixture(scope="module")
def pipe(exported: Callable[[str], Any]) -> Iterator[Pipeline]:
    """The tiny bundle with keep-counts 3 and 6."""
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def builtin(once: Once) -> Path:
    """The built-in model's unpruned bundle."""
    return once.folder("builtin-none", lambda part: export(Request(part, method="none")))
