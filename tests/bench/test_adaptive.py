"""The comparison of one keep-count with two by a cue, on rates whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from vtp.bench.studies import adaptive

KEEPS = [32, 64, 96]


def exam(pictures: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Half of the pictures are right only at 96 tokens; the others at any keep-count."""
    hard = np.random.default_rng(0).permutation(pictures) < pictures // 2
    right = np.where(hard[:, None], [0.0, 0.5, 1.0], [1.0, 1.0, 1.0])
    return right, hard.astype(float) + np.random.default_rng(1).uniform(0, 0.5, pictures)


def test_a_cue_that_knows_gains_and_one_that_does_not_gains_nothing() -> None:
    right, cue = exam()
    for sign in (1, -1):  # the direction is found, not given
        mean, low, high = adaptive.gains(right, sign * cue, KEEPS, "static")
        assert 20 < low <= mean <= high < 28
    noise = np.random.default_rng(2).uniform(size=len(right))
    mean, low, high = adaptive.gains(right, noise, KEEPS, "mixed")
    assert low < 0 < high and abs(mean) < 3


def test_one_keep_count_wins_where_the_curve_bends() -> None:
    """All pictures alike, nearly all right at the middle one: two keep-counts can only lose."""
    right = np.tile([0.6, 0.95, 1.0], (400, 1))
    mean, low, high = adaptive.gains(right, np.random.default_rng(3).uniform(size=400), KEEPS, "static")
    assert low <= mean <= high < -10


def test_peak_is_the_share_of_the_largest() -> None:
    scores = np.array([[1.0, 3.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_allclose(adaptive.peak(scores, 2), [0.7, 0.5])


def test_bad_input_is_one_line(capsys: Any) -> None:
    assert adaptive.main(["nowhere", "--keep", "3,4"]) == 2
    assert "not three keep-counts" in capsys.readouterr().err
    assert adaptive.main(["nowhere"]) == 1
    assert "no bundle at nowhere" in capsys.readouterr().err
