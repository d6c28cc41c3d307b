"""Where a measurement writes: a folder that the user names, else the checkout in the current folder.

Never the folder of the package itself: an installed vtp lies in site-packages.
"""

from __future__ import annotations

from pathlib import Path

from vtp.engines import UsageError

_MARK = 'name = "vtp-edge"'  # of this project's pyproject.toml


def checkout(option: str) -> Path:
    """The current folder, if it is a checkout of vtp. Else UsageError, which names the option to give."""
    folder = Path.cwd()
    project = folder / "pyproject.toml"
    if not project.is_file() or _MARK not in project.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(f"{folder} is not a checkout of vtp; run this in one, or give {option}")
    return folder


def place(named: str | None, option: str, inside: str = "") -> Path:
    """What the user named with `option`, else what `inside` names in the checkout; raises as `checkout`."""
    return checkout(option) / inside if named is None else Path(named)
