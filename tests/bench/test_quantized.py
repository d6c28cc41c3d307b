"""The int8 measurement on a tower of two layers: what is measured, and that all of it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vtp.bench.studies import quantized


@pytest.mark.slow
def test_both_encoders_are_timed(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "figures.json"
    arguments = [
        "--layers",
        "2",
        "--rounds",
        "3",
        "--threads",
        "1",
        "--work",
        str(tmp_path),
        "--json",
        str(out),
    ]
    assert quantized.main(arguments) == 0
    figures = json.loads(out.read_text())
    assert figures["quantised"] == figures["layers_in_all"] == 6  # the tower's last layer is never run
    assert all(len(taken) == 3 and min(taken) > 0 for taken in figures["seconds"])
    assert figures["interval"][0] <= figures["times_faster"] <= figures["interval"][1]
    assert "6 of 6 matrices, activations uint8" in capsys.readouterr().out


def test_no_rounds_are_refused(tmp_path: Path, capsys: Any) -> None:
    assert quantized.main(["--rounds", "0", "--work", str(tmp_path)]) == 2
    assert "at least 1" in capsys.readouterr().err
