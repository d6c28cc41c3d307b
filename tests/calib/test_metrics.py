"""Public sets' own rules. Expected values: LLaVA's m4c_evaluator.py and eval_pope.py, run unchanged."""

from __future__ import annotations

import pytest

from vtp.calib import metrics


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("dont", "don't"),
        ("wouldntve", "wouldntve"),  # both apostrophes lack: not in the table
        ("wouldnt've", "wouldn't've"),
        ("ow'sat", "ow 'sat"),  # an 's is cut off before the table is read
        ("somebody'd", "somebodyd"),
        ("what's up?", "what 's up"),
        ("None", "0"),
        ("ten (10) dogs", "10 10 dogs"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("and/ or-else", "and or else"),
        ("1,000.5 km.", "1000.5 km"),
        ("U.S.A.", "usa"),
        ("10:30", "10:30"),
        ("$5 & up", "$5 & up"),
        ("coca\ncola\t", "coca cola"),
        ("." * 40 + "x", "." * 8 + "x"),  # the reference removes 32 full stops
    ],
)
def test_answers_are_normalised_as_by_the_published_evaluation(given: str, plain: str) -> None:
    assert metrics.normalize(given) == plain


@pytest.mark.parametrize(
    ("answer", "annotators", "score"),
    [
        ("Two.", ["2"] * 3 + ["3"] * 7, 0.9),
        ("a stop sign", ["stop sign"] * 2 + ["stop"] * 8, 0.6),
        ("stop", ["stop sign"] * 2 + ["stop"] * 8, 1.0),
        ("dont walk", ["don't walk"] + ["walk"] * 9, 0.3),
        ("", ["x"] * 10, 0.0),
    ],
)
def test_soft_accuracy_of_textvqa(answer: str, annotators: list[str], score: float) -> None:
    assert metrics.vqa(answer, annotators) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Yes.", 1), (" yes\n", 1), ("yes..", 1), ("yes!", 0), ("yes, it is", 0), ("a yes", 0), ("", 0)],
)
def test_gqa_takes_letters_as_they_are(answer: str, right: int) -> None:
    assert metrics.gqa(answer, ["yes"]) == right


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is a dog", False),
        ("There is not.", False),
        ("Yes. No", True),  # the first sentence alone
        ("NO", True),  # only "No", "no" and "not" are looked for
        ("Nope", True),
        ("not,", False),
        ("no\nyes", True),  # words are cut at spaces alone
        ("", True),
    ],
)
def test_pope_reads_an_answer_as_its_authors_do(answer: str, yes: bool) -> None:
    assert metrics.says_yes(answer) is yes
    assert metrics.pope(answer, ["yes"]) == yes and metrics.pope(answer, ["no"]) == (not yes)
