"""What a pruner's graph costs: every method of the registry can be asked, and mistakes are one line."""

from __future__ import annotations

import re

import pytest

from vtp.bench.studies import pruner_cost
from vtp.export.pruners import find_method, method_names


def test_there_are_cues_for_every_method() -> None:
    cues = pruner_cost.random_cues(16, 32)
    for name in method_names()[1:]:
        method = find_method(name)
        chosen = method((4, 4), 4)(**{cue: cues[cue] for cue in method.needs})
        assert (chosen[0] if method.merges else chosen).shape == (1, 4), name


def test_a_line_for_each_method(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "fastervlm",
        "prumerge",
        "sparsevlm",
        "--grid",
        "4x4",
        "--keep",
        "4",
        "--width",
        "32",
        "--runs",
        "1",
    ]
    assert pruner_cost.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r"\| (\w+) \| [\d.]+ \| (\d+) \| (\d+) \|", line) for line in lines[2:5]]
    assert [row and row[1] for row in rows] == argv[:3]
    assert all(row and int(row[2]) > 0 and int(row[3]) > 0 for row in rows)
    assert lines[-1].startswith("N = 16, K = 4, width 32")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["fastervlm", "--grid", "24"], "grid '24' is not of the form ROWSxCOLUMNS"),
        (["fastervlm", "--grid", "0x4"], "grid '0x4' is not"),
        (["fastervln"], "did you mean 'fastervlm'"),
        (["none"], "method none keeps every visual token"),
        (["fastervlm", "--grid", "2x2", "--keep", "5"], "keep-tokens 5 is outside the 4 visual tokens"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pruner_cost.main(argv) == 2
    said = capsys.readouterr().err.strip()
    assert problem in said and "\n" not in said
