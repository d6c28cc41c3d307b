"""For a test's own Ray workers, which no test can reach into: answers wait while a file exists.

Python imports this at its start where the folder is on PYTHONPATH. An answer waits once it has two tokens.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from importlib.abc import MetaPathFinder
from typing import Any

ANSWER = "vtp.runtime.generation.answer"


class Holding(MetaPathFinder):
    """Changes one module when it is first imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """The module's own, with a loader that goes on to `hold`."""
        if name != ANSWER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def and_hold(module: Any) -> None:
            load(module)
            hold(module.Answer, os.environ["VTP_TEST_HOLD"])

        spec.loader.exec_module = and_hold  # type: ignore[method-assign]
        return spec


def hold(answer: Any, file: str) -> None:
    """Let answers wait while `file` exists and they are not cancelled."""
    take = answer.take

    def waiting(writing: Any, *arguments: Any) -> Any:
        told = writing.request.stop_signal
        while len(writing.result.token_ids) == 2 and os.path.exists(file) and not told.cancelled:  # noqa: PTH110
            time.sleep(0.01)
        return take(writing, *arguments)

    answer.take = waiting


if "VTP_TEST_HOLD" in os.environ:
    sys.meta_path.insert(0, Holding())
