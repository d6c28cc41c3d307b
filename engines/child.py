"""Starts Python children that import what this process does, and nothing from the folder they start in.

`python -m` and `python -c` put the current folder in front of the import path: a `numpy.py` in a folder of
pictures would run. Every Python child of the house is started here; a test holds that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SAFE_PATH = "PYTHONSAFEPATH"  # Python 3.11 and newer, as the option -P
# For older ones: what -m would have put in front is taken away before anything is imported.
_RUN = (
    "import sys; del sys.path[0], sys.argv[0]; import runpy; runpy.run_module({!r}, None, '__main__', True)"
)


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module as `python -m` does, without the current folder on its path."""
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", module, *arguments]
    return [sys.executable, "-c", _RUN.format(module), module, *arguments]


def spawn(target: Callable[..., None], *arguments: Any) -> tuple[Any, Any]:
    """Run `target(connection, *arguments)` in a fresh Python; returns the process and the connection to it.

    Nothing is inherited but what is handed over: no threads and no open engines of this process.
    """
    from multiprocessing import get_context

    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    with _safe_path():
        process.start()
    theirs.close()
    return process, ours


@contextmanager
def _safe_path() -> Iterator[None]:
    """Children that are started meanwhile do not import from the current folder (Python 3.11 and newer)."""
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before
