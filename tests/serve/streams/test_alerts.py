"""When alerts are raised and cleared, and which pictures a gate lets through."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vtp.engines import UsageError
from vtp.runtime.decisions.decision import Decision
from vtp.runtime.result import Timings, VisualTokens
from vtp.serve.streams.alerts import CLEARED, RAISED, Alert, AlertState
from vtp.serve.streams.gate import Gate

from .moving import scene


def decision(share: float) -> Decision:
    return Decision(
        "yes_no", {"yes": share, "no": 1 - share}, "", None, 0.9, VisualTokens(16, 6), [], 5, Timings()
    )


def events(alert: Alert, shares: list[float], seconds: float = 1.0) -> list[str]:
    """A reading every so many seconds."""
    state = AlertState(alert)
    return [state.read(decision(one), place * seconds).event for place, one in enumerate(shares)]


def test_an_alert_is_raised_at_its_threshold_and_ends_below_the_hysteresis() -> None:
    alert = Alert("is it ?", threshold=0.6, hysteresis=0.2, cooldown=0)
    assert events(alert, [0.59, 0.6, 0.5, 0.7, 0.4, 0.39, 0.59, 0.61]) == [
        *("", RAISED, "", "", "", CLEARED, "", RAISED)
    ]


def test_within_the_cooldown_nothing_is_told() -> None:
    alert = Alert("is it ?", threshold=0.5, hysteresis=0, cooldown=3)
    told = events(alert, [1, 0, 1, 0, 0, 1])
    assert told == [RAISED, CLEARED, "", "", "", RAISED]


def test_what_still_holds_after_the_cooldown_is_told_then() -> None:
    alert = Alert("is it ?", threshold=0.5, hysteresis=0, cooldown=4)
    assert events(alert, [1, 0, 1, 1, 1, 1, 0]) == [RAISED, CLEARED, "", "", RAISED, "", CLEARED]


def test_an_alert_may_have_other_answers() -> None:
    alert = Alert.of(" how is the door ? [open | closed|gone] ", 0.5, 0.1, 10, "texts")
    assert (alert.question, alert.options, alert.answer) == (
        *("how is the door ?", ("open", "closed", "gone"), "open"),
    )
    plain = Alert.of("is [it] ?", 0.5, 0.1, 10, "letters")
    assert (plain.question, plain.options, plain.answer) == ("is [it] ?", None, "yes")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"question": " "}, "the question is empty"),
        ({"threshold": 0}, "threshold 0 would always"),
        ({"threshold": 1.5}, "threshold 1.5 is not allowed"),
        ({"threshold": float("nan")}, "threshold nan is not allowed"),
        ({"hysteresis": 0.6}, "hysteresis 0.6 is not allowed; give a number from 0 to 0.5"),
        ({"cooldown": -1}, "cooldown -1 is not allowed"),
        ({"answer": "perhaps"}, "'perhaps' is not among yes, no"),
        ({"options": ("red",)}, "1 options are given"),
    ],
)
def test_bad_alerts_are_refused(arguments: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        Alert(**{"question": "is it ?", **arguments})  # type: ignore[arg-type]


# -- the gate ------------------------------------------------------------------------------------------------


def shown(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels)


def changed_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    """The gate's measure in plain loops over blocks of an eighth of the edge."""
    grey = [np.asarray(shown(one).convert("L"), float) for one in (first, second)]
    edge = len(first) // 64
    means = [one.reshape(64, edge, 64, edge).mean(axis=(1, 3)).round() for one in grey]
    most = 0.0
    for top in range(0, 64, 8):
        for left in range(0, 64, 8):
            block = [one[top : top + 8, left : left + 8] for one in means]
            most = max(most, float(np.abs(block[0] - block[1]).mean()) / 255)
    return most


def test_a_gate_measures_the_block_that_changed_most() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    second = first.copy()
    second[40:60, 200:230] = 255
    gate = Gate(0.01)
    assert gate.change(shown(first)) == 1.0
    assert gate.change(shown(second)) == pytest.approx(changed_by_hand(first, second), abs=2 / 255)
    assert gate.change(shown(second)) is None


def test_slow_drift_adds_up_until_it_is_seen() -> None:
    """Each frame differs from the one before by less than the gate's least."""
    ground = np.full((240, 320, 3), 60, np.uint8)
    gate, passed = Gate(0.05), []
    for number in range(60):
        if gate.change(shown(ground + np.uint8(number))) is not None:
            passed.append(number)
    # 0.05 of 255 are 12.75 levels: every thirteenth frame.
    assert passed == [0, 13, 26, 39, 52]


def test_noise_alone_does_not_pass_and_a_cut_does() -> None:
    rng, gate = np.random.default_rng(1), Gate()

    def noisy(picture: np.ndarray) -> Image.Image:
        return shown(np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8))

    assert gate.change(noisy(scene())) == 1.0
    assert [gate.change(noisy(scene())) for _ in range(20)] == [None] * 20
    assert (gate.change(noisy(scene("scene2.png"))) or 0) > 0.1
    gate.reset()
    assert gate.change(noisy(scene("scene2.png"))) == 1.0


@pytest.mark.parametrize("least", [0, -1, 1.01, float("nan"), "a"])
def test_a_bad_change_is_refused(least: object) -> None:
    with pytest.raises(UsageError, match="is not allowed; give a number above 0"):
        Gate(least)  # type: ignore[arg-type]
