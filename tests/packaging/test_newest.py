"""make test-newest: what it says of versions, and that what it runs exists."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from ..newest import differing

ROOT = Path(__file__).parents[2]


def test_versions_that_differ_are_named() -> None:
    pytest, pillow = metadata.version("pytest"), metadata.version("pillow")
    lines = f"# a comment\npytest==0.1\npillow=={pillow}\nnot-installed-anywhere==1.0\n"
    assert differing(lines) == [("pytest", "0.1", pytest)]
    torch = metadata.version("torch").partition("+")[0]
    assert differing(f"torch=={torch}\n") == []


def test_every_line_of_the_constraints_is_read() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)
    assert len(pins) == len({line.partition("==")[0] for line in pins})


def test_what_it_runs_by_default_exists() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (quick,) = re.findall(r"(?m)^QUICK := (.*)$", text)
    assert quick.split() and all((ROOT / name).exists() for name in quick.split())
