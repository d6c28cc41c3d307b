"""Numbers of flags: digits as in JSON, of any size, or one line."""

import argparse

import pytest

from vtp.runtime.commands.arguments import real, whole

ODD = [
    "1_000",
    "\u0661\u0662",
    "\uff11",
    "0x10",
    "",
    " ",
    "1 ",
    "one",
    "+",
    "-",
    "1e",
    "nan",
    "inf",
    "-Infinity",
]


@pytest.mark.parametrize("text", [*ODD, "1.0", "1e3"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
        whole(text)


@pytest.mark.parametrize("text", [*ODD, "1.2.3", "1,5", ".", "1e99999"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number"):
        real(text)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("-3", -3), ("007", 7), ("2048", 2048)])
def test_whole_numbers(text: str, value: int) -> None:
    assert whole(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("0.97", 0.97), ("5", 5.0), ("-.5", -0.5), ("1.", 1.0), ("2e-3", 0.002)]
)
def test_numbers(text: str, value: float) -> None:
    assert real(text) == value
