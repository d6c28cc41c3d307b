"""What the newest versions are that `make test-newest` installed, beside those of constraints.txt."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

PIN = re.compile(r"(?m)^([A-Za-z0-9._-]+)==(\S+)$")


def differing(constraints: str) -> list[tuple[str, str, str]]:
    """Packages of constraints.txt that are installed in another version: name, pinned, installed."""
    found = []
    for name, pinned in PIN.findall(constraints):
        try:
            installed = metadata.version(name).partition("+")[0]  # 2.13.0+cpu is 2.13.0
        except metadata.PackageNotFoundError:
            continue
        if installed != pinned:
            found.append((name, pinned, installed))
    return found


if __name__ == "__main__":
    rows = differing(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if not rows:
        print("every installed package has the version of constraints.txt")
    for name, pinned, installed in rows:
        print(f"{name:<28} {pinned:>12} -> {installed}")
