"""The comparison of `make test-arm64` sees what is wrong and how close a choice was. (It needs no qemu.)"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.export.pruners import picture_methods

from . import environment
from .__main__ import main
from .bundles import PROMPT8, QUICK, UNSERVED, cases, select
from .closeness import STEPS, movement, turning_point
from .commands import report
from .margins import compare, margin

ANSWER = {
    "tokens": [7, 2],
    "text": "blue",
    "kept": [1, 4, 6],
    "likely": [[[7, -0.1], [9, -0.1005], [5, -8.0]]],
}
WANTED = {"answers": [ANSWER, ANSWER], "rows": None}
CLOSE = {"file": "pruner.onnx", "moved": 1e-6, "turned": 3e-6, "same": True}


def changed(**other: Any) -> dict[str, Any]:
    """The second answer with something else in it."""
    return {**WANTED, "answers": [ANSWER, {**copy.deepcopy(ANSWER), **other}]}


def counts(found: dict[str, Any], closeness: Any = None, weights: str = "float32") -> tuple[int, int, int]:
    """Answers that are the same, close calls, and what is wrong."""
    outcome = compare(found, WANTED, {} if closeness is None else {"1": closeness}, weights)
    return outcome.same, len(outcome.close), len(outcome.wrong)


def test_equal_answers_are_the_same() -> None:
    nearly = [[[7, -0.1002], [9, -0.1005], [5, -8.0]]]
    outcome = compare(changed(likely=nearly), WANTED, {}, "float32")
    assert (outcome.answers, outcome.same, outcome.close, outcome.wrong) == (2, 2, [], [])
    assert outcome.apart == pytest.approx(2e-4)


@pytest.mark.parametrize(
    "told", [{"error": "it cannot"}, {}, {"answers": [], "rows": None}, {"answers": [ANSWER]}]
)
def test_missing_answers_are_wrong(told: dict[str, Any]) -> None:
    assert counts(told)[2] == 1
    assert len(compare(WANTED, told, {}, "float32").wrong) == 1


def test_other_tokens_are_close_by_their_margin() -> None:
    assert counts(changed(tokens=[9, 2], text="red")) == (1, 1, 0)  # 0.0005 nats
    assert counts(changed(tokens=[5, 2], text="green")) == (1, 0, 1)  # 7.9 nats
    assert counts(changed(tokens=[8, 2], text="grey")) == (1, 0, 1)  # not among the likely ones
    (line,) = compare(changed(tokens=[9, 2], text="red"), WANTED, {}, "float32").close
    assert line == "question 1: 'red', not 'blue'; margin 5.0e-04"


def test_an_answer_that_goes_on_has_the_margin_of_the_other_side() -> None:
    """The token that ends an answer has no list of likely ones."""
    longer = {**ANSWER, "tokens": [7, 5, 2], "likely": [*ANSWER["likely"], [[5, -0.7], [2, -0.75]]]}
    assert margin(longer, ANSWER) == margin(ANSWER, longer) == pytest.approx(0.05)
    assert margin(ANSWER, ANSWER) is None
    assert margin({**ANSWER, "tokens": [7]}, ANSWER) is None  # it was cut off


@pytest.mark.parametrize(
    ("closeness", "weights", "close"),
    [
        (CLOSE, "float32", True),
        ({**CLOSE, "same": False}, "float32", True),
        ({**CLOSE, "turned": 3e-5}, "float32", False),  # thirty times farther than the inputs moved
        ({**CLOSE, "turned": None}, "float32", False),
        ({**CLOSE, "moved": 0.0, "turned": 1e-6}, "float32", True),  # float32's own rounding
        ({**CLOSE, "moved": 0.0, "turned": 1e-5}, "float32", False),
        ({**CLOSE, "moved": 1e-2, "turned": 1e-2}, "float32", False),  # the encoder itself differs
        ({**CLOSE, "moved": 5e-3, "turned": 1e-5}, "float16", True),  # rounded to between the nodes
        ({**CLOSE, "moved": 3e-2, "turned": 1e-5}, "float16", False),
        ({**CLOSE, "moved": 3e-2, "turned": 1e-2}, "int8", True),
        (None, "float32", False),
    ],
)
def test_other_kept_tokens_are_close_by_what_turns_the_choice(
    closeness: dict[str, Any] | None, weights: str, close: bool
) -> None:
    found = changed(kept=[1, 4, 5], tokens=[5, 2], text="green")
    assert counts(found, closeness, weights) == (1, int(close), int(not close))


def test_what_turned_a_choice_is_told() -> None:
    (line,) = compare(changed(kept=[1, 4, 5]), WANTED, {"1": CLOSE}, "float32").close
    wanted = "question 1: 1 of 3 kept tokens differ, the same answer; pruner.onnx: inputs moved by 1e-06, on "
    assert line == wanted + "x86-64 3e-06 turns the choice"


def test_requests_that_shared_no_step_are_wrong() -> None:
    assert counts({**WANTED, "rows": [10, 10]}) == (2, 0, 1)
    assert counts({**WANTED, "rows": [10, 11]}) == (2, 0, 0)


# -- how close a choice was ----------------------------------------------------------------------------------


def largest(feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.sort(np.argsort(-feeds["scores"])[:, :2])


def test_a_choice_turns_where_its_scores_are_as_close_as_the_movement() -> None:
    """Two scores of a row of length 10 that are 0.01 apart turn when it moves by about a thousandth."""
    scores = np.array([[9.0, 3.0, 2.99, 1.0, 0.5]])
    turned = turning_point(largest, {"scores": scores})
    assert turned is not None and 3e-4 <= turned <= 3.2e-2
    wide = np.array([[9.0, 6.0, 1.0, 0.5, 0.2]])
    later = turning_point(largest, {"scores": wide})
    assert later is None or later > turned


def test_a_tie_turns_at_once_and_whole_numbers_are_not_moved() -> None:
    assert turning_point(largest, {"scores": np.array([[9.0, 3.0, 3.0, 3.0, 1.0]])}) == STEPS[0]
    assert turning_point(largest, {"scores": np.array([[9, 3, 3, 3, 1]])}) is None


def test_movement_is_relative_to_each_row() -> None:
    here = {"a": np.array([[3.0, 4.0], [300.0, 400.0]], np.float32), "n": np.array([1, 2])}
    there = {"a": np.array([[3.0, 4.5], [300.0, 400.5]], np.float32), "n": np.array([5, 6])}
    assert movement(there, here) == pytest.approx(0.1)
    assert movement(here, here) == 0


# -- which bundles, and where --------------------------------------------------------------------------------


def test_every_method_is_asked_with_each_target_and_kind_of_weights() -> None:
    kinds = [(case.target, case.weights) for case in cases() if case.method == "vispruner"]
    assert len(kinds) == len(set(kinds)) == 8 and not UNSERVED & set(kinds)
    methods = {case.method for case in cases() if not case.then}
    assert select([]) == cases() and methods == set(picture_methods())
    assert all(
        sum(case.method == one and not case.then for case in cases()) == 7 + (one in PROMPT8)
        for one in methods
    )


def test_words_select_bundles() -> None:
    assert {case.name for case in select(["quick"])} == set(QUICK)
    assert {case.name for case in select(["dart-int8", "fastv-ort-int4"])} == {
        "dart-ort-int8",
        "dart-jetpack6-int8",
        "fastv-ort-int4",
    }
    with pytest.raises(SystemExit, match="dartt-int8: no dartt; there are quick, adaptprune"):
        select(["dartt-int8"])


def test_what_is_missing_is_told_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert main() == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("make test-arm64 needs qemu-user-static, apt, dpkg")


def test_refusals_name_the_packages(tmp_path: Path) -> None:
    def there(command: str) -> str | None:
        return None if command == environment.QEMU else f"/usr/bin/{command}"

    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    assert environment.refusal(there, "x86_64", keyring) == (
        "make test-arm64 needs qemu-user-static: apt-get install qemu-user-static (Debian, Ubuntu)"
    )
    assert environment.refusal(str, "x86_64", keyring) == ""
    assert "debian-archive-keyring" in environment.refusal(str, "x86_64", tmp_path / "none")
    assert "this machine is arm64" in environment.refusal(str, "aarch64", keyring)


def test_versions_are_those_of_the_constraints() -> None:
    pins = environment.pins()
    assert [pin.partition("==")[0] for pin in pins] == [
        *("tokenizers", "numpy", "pillow", "jinja2", "markupsafe", "onnxruntime")
    ]


# -- the commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ({"a": {"text": "blue", "logprobs": [-0.5, -0.1]}}, 0, "same   a: 'blue', 5.0e-04 nats apart"),
        ({"a": {"text": "red", "logprobs": [-0.5005, -0.1]}}, 1, "WRONG  a: {'text': 'red'}, not"),
        ({"a": {"text": "blue", "logprobs": [-0.5005, -0.3]}}, 1, "2.0e-01 nats apart"),
        ({"a": {"text": "blue", "logprobs": [-0.5005]}}, 1, "1 tokens of 2"),
        ({}, 1, "WRONG  a: on one machine only"),
    ],
)
def test_answers_of_commands_are_compared(
    found: dict[str, Any], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(found, {"a": {"text": "blue", "logprobs": [-0.5005, -0.1]}}) == code
    assert said in capsys.readouterr().out


def test_no_answer_of_a_command_is_no_success() -> None:
    assert report({}, {}) == 1
