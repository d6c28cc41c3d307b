"""A hub that holds a bundle, and a client with an empty cache that asks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ...stand_ins.hub_server import Hub, connect, serving


@pytest.fixture(scope="module")
def files(exported: Callable[[str], Any]) -> dict[str, bytes]:
    """The files of a bundle, by name."""
    folder = exported("vispruner").folder
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> Iterator[Hub]:
    """org/name holds the bundle, beside files that are none of it."""
    monkeypatch.chdir(tmp_path)
    with serving() as hub:
        connect(hub, tmp_path / "home", monkeypatch)
        beside = {"README.md": b"# card", "engine.plan": b"plan", "run.py": b"raise SystemExit"}
        hub.repo("org/name", {**files, **beside})
        yield hub
