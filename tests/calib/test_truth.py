"""Another model's answers as the truth, and wrong numbers told from wrong words."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.calib import cli
from vtp.calib.data import Sample
from vtp.calib.keep.journal import Answer
from vtp.calib.keep.wrong import Kinds
from vtp.calib.truth import has_number, with_truth
from vtp.engines import UsageError

ASKED = [Sample(Path("x/a.png"), "how many ?"), Sample(Path("x/a.png"), "what ?", ("dog",))]


def write(file: Path, *lines: Any) -> Path:
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return file


def test_answers_are_found_by_picture_and_prompt(tmp_path: Path) -> None:
    what = {"image": "/elsewhere/a.png", "prompt": "what ?", "answer": " a cat\n"}
    many = {"image": "a.png", "prompt": "how many ?", "text": "2"}
    other = {"image": "b.png", "prompt": "what ?", "answer": "tree"}
    found = with_truth(ASKED, write(tmp_path / "t.jsonl", other, what, many, what))
    assert [one.answers for one in found] == [("2",), ("a cat",)]
    assert [(one.image, one.prompt) for one in found] == [(one.image, one.prompt) for one in ASKED]


def test_answers_without_names_are_taken_in_order(tmp_path: Path) -> None:
    """As `vtp-run --batch` prints them; more than there are questions is what --limit leaves."""
    file = write(tmp_path / "t.jsonl", {"text": " 2", "kept": []}, {"text": " cat"}, {"text": "more"})
    assert [one.answers for one in with_truth(ASKED, file)] == [("2",), ("cat",)]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([{"text": "2"}], "has 1 answers, and there are 2 questions"),
        ([{"text": "2"}, {"text": 3}], 'line 2 has no "answer"'),
        ([[], []], 'line 1 has no "answer"'),
        ([{"text": "2"}, {"image": "a.png", "prompt": "what ?", "text": "x"}], "some lines have"),
        ([{"image": "a.png", "prompt": "what ?", "text": "x"}], "has no answer to 'how many ?' about a.png"),
        ([{"image": "a.png", "prompt": 3, "text": "x"}], '"image" and "prompt" must be text'),
        ([{"image": "a.png", "prompt": "what ?", "text": text} for text in "xy"], "gives another answer"),
    ],
)
def test_a_truth_that_does_not_fit_is_one_line(tmp_path: Path, lines: list[Any], problem: str) -> None:
    with pytest.raises(UsageError, match=re.escape(problem)) as caught:
        with_truth(ASKED, write(tmp_path / "t.jsonl", *lines))
    assert "\n" not in str(caught.value)


def test_a_truth_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--truth .*none\.jsonl does not exist"):
        with_truth(ASKED, tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("answer", "number"), [("2 dogs", True), ("Two", True), ("10:30", True), ("none", True), ("often", False)]
)
def test_numbers_are_told_from_words(answer: str, number: bool) -> None:
    assert has_number(answer) is number


def test_wrong_numbers_and_words_are_counted_apart() -> None:
    truths = [("3",), ("two", "2", "three"), ("dog",), ("cat",), ("0",)]
    samples = [Sample(Path("a"), str(place), answers) for place, answers in enumerate(truths)]
    unpruned = [Answer(text, [], None) for text in ("dog", "dog", "7", "dog", "dog")]
    kinds = Kinds(samples, "exact", unpruned)
    assert kinds.to_json([0, 1, 1, 0, 0.3]) == {"numbers": [2, 3], "words": [1, 2]}
    assert str(kinds.words([0, 1, 1, 0, 1])) == "1 of 2"
    agreeing = Kinds(samples, "agreement", unpruned)  # the unpruned answers are the truth
    assert agreeing.to_json([1, 0.9, 1, 1, 1]) == {"numbers": [0, 1], "words": [1, 4]}


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions without answers."""
    folder = tmp_path_factory.mktemp("asked")
    rng = np.random.default_rng(5)
    lines = [{"image": f"{number}.png", "prompt": f"what is {number} ?"} for number in range(4)]
    for line in lines:
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(folder / line["image"])
    return write(folder / "q.jsonl", *lines)


def test_keep_takes_another_models_answers(questions, exported, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli.report, "draw", lambda *_: False)  # pictures take longer than all the rest
    truth = write(tmp_path / "large.jsonl", *({"text": text} for text in ("4", "seven", "a dog", "cat")))
    bundle = Path(shutil.copytree(exported("vispruner").folder, tmp_path / "bundle"))
    options = ["--data", questions, "--reference", exported("none").folder, "--truth", truth]
    options += ["--budget-ms", "1e6", "--threads", "1", "--max-new-tokens", "2", "--dry-run"]
    command = ["keep", str(bundle), *map(str, options)]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metric"] == "exact" and found["unpruned"][0] == 0  # a random model knows none of them
    assert found["wrong"] == {keep: {"numbers": [2, 2], "words": [2, 2]} for keep in ("3", "6")}
    rows = list(csv.DictReader((tmp_path / "bundle-calib/keep.csv").open()))
    assert [(row["wrong_numbers"], row["numbers"], row["wrong_words"], row["words"]) for row in rows] == [
        ("2", "2", "2", "2")
    ] * 2
    assert cli.main(command) == 0
    assert "wrong: 3 kept 2 of 2 numbers, 2 of 2 words; unpruned 2 of 2 numbers" in capsys.readouterr().out
    assert cli.main([*command, "--markdown"]) == 0
    caption, empty, header, rule, *table = capsys.readouterr().out.splitlines()
    assert "4 questions of q.jsonl against the answers in large.jsonl, metric exact" in caption and not empty
    assert header.startswith("| kept | score (95 %) | of unpruned (95 %) | wrong numbers | wrong words |")
    assert rule.count("---") == header.count("|") - 1
    assert [line.split(" | ")[3] for line in table] == ["2 of 2"] * 2 and table[0].endswith("| chosen |")
