"""vtp: visual token pruning. `Pipeline` answers from a bundle; the rooms are packages of their own.

This folder is the import root: the rooms lie beside it, and a relative link for each (`vtp/export ->
../export`) lets editors, type checkers and `pip install -e .` find them. Importing `vtp` loads nothing heavy.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers read it; typing itself takes longer to import than this module

if TYPE_CHECKING:
    from typing import Any

    from vtp.runtime import Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Pipeline` when it is first used."""
    if name == "Pipeline":
        from vtp.runtime import Pipeline

        return Pipeline
    raise AttributeError(f"module 'vtp' has no attribute {name!r}")
