"""Scoring of the exam."""

import pytest

from vtp.scenes.exam import blank, by_picture, held_out, is_right, report, score, wilson
from vtp.scenes.generator.pictures import KINDS


def test_right_answers_score_full_marks_per_kind() -> None:
    items = list(held_out(8))
    scores = score(items, [f" {item.answer}\n" for item in items])
    assert scores["all"].right == scores["all"].total == 8
    assert [scores[kind].total for kind in KINDS] == [2, 2, 2, 2]
    assert "all    100.0 %" in report(scores)


def test_wrong_answers_score_nothing_and_counts_must_match() -> None:
    items = list(held_out(4))
    assert score(items, ["nothing"] * 4)["all"].rate == 0
    with pytest.raises(ValueError):
        score(items, ["too few"])


@pytest.mark.parametrize(
    ("answer", "right"), [("red", True), (" red ", True), ("Red", False), ("red.", False)]
)
def test_exact_match(answer: str, right: bool) -> None:
    assert is_right(answer, "red") is right


def test_wilson_interval() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(900, 1000)
    assert (round(low, 4), round(high, 4)) == (0.8798, 0.9171)
    assert wilson(10, 10)[1] == pytest.approx(1) and wilson(0, 10)[0] == pytest.approx(0)


def test_groups_share_a_picture() -> None:
    groups = list(by_picture(held_out(9)))
    assert [len(group) for group in groups] == [4, 4, 1]
    assert blank(groups[0][0].image).getextrema() == ((120, 120),) * 3


def test_an_empty_exam_is_refused() -> None:
    with pytest.raises(ValueError, match="count 0 is not allowed"):
        held_out(0)
