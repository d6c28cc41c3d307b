"""Names of the methods and tower reductions: their files are listed, and nothing is imported."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from vtp.engines.errors import UsageError, nearest

NONE = "none"
DEFAULT = "vispruner"  # docs/methods.md says why

# Modules of their packages that are not methods, or not reductions.
_SUPPORT = {
    "pruners": {"base", "greedy", "merge", "ops", "registry", "site"},
    "towers": {"base", "blocks", "registry"},
}


def method_names() -> list[str]:
    """Every method the command line knows: "none", then the files of `pruners/`, sorted."""
    return [NONE, *_files_of("pruners")]


def check_method_name(name: str) -> None:
    """Raise UsageError, with the nearest name and the list, for a name that no method has."""
    known = method_names()
    if name not in known:
        raise UsageError(
            f"unknown method '{name}'{nearest(name, known)}; methods: {', '.join(known)}, or FILE.py:CLASS"
        )


def is_outside(text: str) -> bool:
    """Whether `--method` names a class in a user's own file, written FILE.py:CLASS."""
    return ".py" in text


def reduction_names() -> list[str]:
    """Every tower reduction: the files of `towers/`, sorted."""
    return _files_of("towers")


def _files_of(package: str) -> list[str]:
    files = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / package)]))
    return sorted(name for name in files if name not in _SUPPORT[package] and not name.startswith("_"))
