"""Holds a pipeline's prompts where a test wants them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from vtp.runtime.stages.runner import StageRunner


class Gate:
    """Holds every prompt's stages until `open`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self._open = threading.Semaphore(0), threading.Event()
        run = StageRunner.encode  # the first of them, of a prompt without pictures as well

        def held(runner: StageRunner, *arguments: Any) -> Any:
            self.entered.release()
            assert self._open.wait(60)
            return (yield from run(runner, *arguments))

        monkeypatch.setattr(StageRunner, "encode", held)

    def open(self) -> None:
        self._open.set()
