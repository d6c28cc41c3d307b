"""make test-oldest tries the very versions that pyproject.toml says are the oldest."""

from __future__ import annotations

import re
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def least(lines: list[str]) -> dict[str, str]:
    """Package -> the version behind >=."""
    return dict(found.groups() for line in lines if (found := re.fullmatch(r"([\w-]+)>=([\d.]+)", line)))  # type: ignore[misc]


def is_at_least(version: str, least: str) -> bool:
    return [int(part) for part in version.split(".")] >= [int(part) for part in least.split(".")]


def test_the_oldest_pins_are_the_least_versions() -> None:
    """Of the runtime's own dependencies: the last patch of the least version, and no other."""
    (line,) = re.findall(r"(?m)^OLDEST_PINS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"))
    pins = dict(pin.split("==") for pin in line.split())
    wanted = least(PROJECT["dependencies"])
    assert len(wanted) == len(PROJECT["dependencies"]) and pins.keys() == wanted.keys()
    for name, version in pins.items():
        assert f"{version}.".startswith(f"{wanted[name]}."), name


def test_pinned_versions_are_not_older_than_the_least() -> None:
    """Of the extras as well."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    for name, oldest in [pair for some in extras.values() for pair in least(some).items()]:
        if name in pinned:
            assert is_at_least(pinned[name], oldest), name


def test_the_server_asks_for_a_pillow_without_the_fault_in_libwebp() -> None:
    """Pillow 10.0.1 brought libwebp 1.3.2 (CVE-2023-4863)."""
    assert is_at_least(least(PROJECT["optional-dependencies"]["serve"])["pillow"], "10.0.1")
