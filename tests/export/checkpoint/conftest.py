"""What tests of model folders share: a folder to be spoilt, and an end to waiting."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the smallest model, to be spoilt."""
    return Path(shutil.copytree(model_folder("mha"), tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """What waits for ever fails instead: every case here is a matter of seconds on an idle machine."""

    def late(*_: object) -> None:
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(900)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
