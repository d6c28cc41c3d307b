"""Tables fold to the terminal: every word is there, and no line is longer than it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest

from vtp.runtime.commands.tables import markdown_table, table

HEADER = ["engine", "ms", "why it does not run here"]
ROWS = [
    ["ort-cpu", "1.5", "-"],
    ["tensorrt", "12", "no libnvinfer.so.10 here: install TensorRT 10 or newer, or choose an ort engine"],
]


def test_a_wide_terminal_changes_nothing() -> None:
    plain = table(HEADER, ROWS)  # the tests' output is no terminal
    assert plain == table(HEADER, ROWS, 200)
    assert plain.splitlines()[0] == "engine     ms  why it does not run here"
    assert plain.splitlines()[2] == "ort-cpu   1.5  -" and len(plain.splitlines()) == 4


@pytest.mark.parametrize("width", [79, 60, 40, 30])
def test_cells_take_several_lines_in_their_own_column(width: int) -> None:
    lines = table(HEADER, ROWS, width).splitlines()
    assert max(map(len, lines)) <= width and len(lines) > 4
    start = lines[0].index("why")
    assert all(line[start - 1] == " " for line in lines if "-" * start not in line)
    words = "".join(line[start:] for line in lines[3:])
    assert words.replace(" ", "").endswith(ROWS[1][2].replace(" ", ""))


def test_no_column_vanishes() -> None:
    lines = table(["a" * 30, "b" * 30], [["c" * 30, "d" * 30]], 5).splitlines()
    assert {len(line) for line in lines} <= {18, 16}
    assert "".join(lines).count("c") == 30 and "".join(lines).count("d") == 30


def test_the_terminals_own_width_is_taken() -> None:
    script = f"from vtp.runtime.commands.tables import table; print(table({HEADER}, {ROWS}))"
    parent, child = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=child, env={**os.environ, "COLUMNS": "50"}, check=True
    )
    os.close(child)
    text = os.read(parent, 65536).decode()
    os.close(parent)
    assert done.returncode == 0
    assert max(map(len, re.split(r"\r?\n", text))) <= 50 and "libnvinfer.so.10" in text


def test_markdown_columns_are_aligned_as_asked() -> None:
    header, rows = ["kept", "method", "%", "ms"], [["6", "fastv", "1.5", "2"]]

    def marks(**how: Any) -> str:
        first, below, last = markdown_table(header, rows, **how).splitlines()
        assert (first, last) == ("| kept | method | % | ms |", "| 6 | fastv | 1.5 | 2 |")
        return below

    assert marks() == "| --- | --- | --- | --- |"
    assert marks(left=1) == "| --- | ---: | ---: | ---: |"
    assert marks(left=0, tight=True) == "|---:|---:|---:|---:|"
    assert marks(align="rlr", tight=True) == "|---:|---|---:|---:|"
    assert markdown_table(["a"], [], tight=True) == "| a |\n|---|"
