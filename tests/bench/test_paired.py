"""Paired differences: pictures are drawn, not questions; the interval holds the truth."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.bench.studies import paired
from vtp.scenes.exam import held_out


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Pictures of four questions that stand and fall together: 95 % of 200 samples, give or take."""
    rng, truth, held = np.random.default_rng(0), 0.1, 0
    pictures = np.repeat(np.arange(60), 4)
    for _ in range(200):
        difference = np.repeat(rng.choice([-1, 0, 1], 60, p=[0.1, 0.7, 0.2]), 4).astype(float)
        low, high = paired.interval(difference, pictures, draws=400)
        held += low <= truth <= high
    assert 180 <= held <= 198


def test_questions_about_one_picture_count_once() -> None:
    each = np.random.default_rng(1).normal(size=50)
    once = paired.interval(each, list(range(50)), draws=500)
    again = paired.interval(np.repeat(each, 4), list(np.repeat(np.arange(50), 4)), draws=500)
    np.testing.assert_allclose(once, again)
    alone = paired.interval(np.repeat(each, 4), list(range(200)), draws=500)
    assert alone[1] - alone[0] < 0.7 * (again[1] - again[0])


def test_the_numbers_of_pictures_do_not_matter_only_which_are_equal() -> None:
    difference = np.array([1.0, 0.0, -1.0, 1.0, 1.0])
    one = paired.interval(difference, [7, 7, 3, 9, 9], draws=300)
    assert one == paired.interval(difference, [1, 1, 0, 2, 2], draws=300)
    assert paired.interval(np.full(8, 0.25), list(range(8)), draws=50) == (0.25, 0.25)


def test_the_table_counts_who_alone_was_right() -> None:
    right = {
        "mine": np.array([[True, True, True, False], [True, False, False, False]]),
        "theirs": np.array([[True, False, False, True], [True, True, True, False]]),
    }
    lines = paired.markdown("mine", right, [6, 3], [0, 0, 1, 1]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 6 | 75.0 | theirs | 50.0 | +25.0 (") and lines[2].endswith("| 2 | 1 |")
    assert lines[3].startswith("| 3 | 25.0 | theirs | 75.0 | -50.0 (") and lines[3].endswith("| 0 | 2 |")


def test_two_bundles_are_asked_the_same(
    exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(exported(name).folder) for name in ("vispruner", "original")]
    capsys.readouterr()
    file = tmp_path / "right.json"
    argv = [*folders, "--keep", "3,6", "--count", "6", "--threads", "1", "--json", str(file)]
    assert paired.main(argv) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["6", "3"]
    found = json.loads(file.read_text())
    assert {spec: {keep: len(ones) for keep, ones in rows.items()} for spec, rows in found.items()} == {
        folder: {"6": 6, "3": 6} for folder in folders
    }


def test_an_answer_counts_where_it_is_the_right_one(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(held_out(6))
    monkeypatch.setattr(paired, "is_right", lambda text, answer: answer == items[2].answer)
    right = paired.take_exam(exported("vispruner").folder, items, [6, 3], threads=1)
    assert right.tolist() == [[item.answer == items[2].answer for item in items]] * 2


def test_a_bundle_s_folder_is_taken_as_it_is(exported: Any) -> None:
    folder = exported("vispruner").folder
    assert paired.bundle(str(folder), argparse.Namespace()) == folder


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["focal", "nothere"], "nothere"),
        (["vispruner:rr=1", "focal"], "no option 'rr'"),
        (["focal", "vispruner", "--keep", "x"], "keep-tokens 'x'"),
        (["focal", "vispruner", "focal"], "focal is named twice"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str],
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paired, "take_exam", lambda *_: np.zeros((5, 4), bool))
    monkeypatch.setattr(paired, "export", _refuse)
    assert paired.main([*argv, "--work", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert problem in said[-1]


def _refuse(request: Any) -> Any:
    """What the exporter refuses before it loads a model; what it would take is passed over."""
    assert request.choice
    return argparse.Namespace(folder=request.output)
