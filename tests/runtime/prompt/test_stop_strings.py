"""Stop strings cut an answer wherever tokens split them, and hold back no more than they must."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtp.engines.errors import UsageError
from vtp.runtime.prompt.prompter import StopStrings


def cut_by_hand(text: str, stops: list[str]) -> str:
    """Read character by character; at the first that completes a stop string, cut where the longest began."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))]
    return text


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_wherever_tokens_split_them(pieces: list[str], stops: list[str]) -> None:
    holder, out = StopStrings(stops), ""
    full = "".join(pieces)
    expected = cut_by_hand(full, stops)
    for piece in pieces:
        out += holder.push(piece)
        assert expected.startswith(out)
    assert holder.hit == (expected != full or any(stop in full for stop in stops))
    assert out + holder.finish() == expected


def test_stop_strings_hold_back_no_more_than_they_must() -> None:
    holder = StopStrings(["\nUSER:"])
    assert [holder.push(piece) for piece in ("a star", "\nUS", "A\n", "\nUSER", ": more")] == [
        "a star",
        "",
        "\nUSA",
        "\n",
        "",
    ]
    assert holder.hit and holder.finish() == "" and holder.push("x") == ""
    assert StopStrings("b").push("abc") == "a"
    free = StopStrings()
    assert free.push("anything") == "anything" and not free.hit


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3], ""])
def test_bad_stop_strings_are_refused(stops: Any) -> None:
    with pytest.raises(UsageError, match="stop string"):
        StopStrings(stops)
