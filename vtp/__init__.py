"""vtp: visual token pruning. `Pipeline` answers from a bundle; the rooms are packages of their own.

This folder is the import root: the rooms lie beside it, and a relative link for each (`vtp/export ->
../export`) lets editors, type checkers and `pip install -e .` find them. Importing `vtp` loads nothing heavy.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers read it; typing itself takes longer to import than this module

if TYPE_CHECKING:
    from typing import Any

    from vtp.runtime import Pipeline, VtpForImageTextToText

__version__ = "0.1.0"
__all__ = ["Pipeline", "VtpForImageTextToText", "__version__"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first used."""
    if name in ("Pipeline", "VtpForImageTextToText"):
        import vtp.runtime

        return getattr(vtp.runtime, name)
    raise AttributeError(f"module 'vtp' has no attribute {name!r}")
