"""A result's text with and without the space that a model's first word begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtp.runtime import Pipeline, Result, Timings, VisualTokens
from vtp.runtime.commands.run import main
from vtp.runtime.prompt.detokenizer import Detokenizer

from .test_pipeline import PROMPT


def answer(raw_text: str, **fields: Any) -> Result:
    given = {"token_ids": [1], "kept": [], "prompt_tokens": 1, "finish_reason": "eos", **fields}
    return Result(raw_text, visual_tokens=VisualTokens(4, 2), timings=Timings(), **given)


@pytest.mark.parametrize(
    ("raw_text", "text"),
    [(" blue", "blue"), ("blue ", "blue "), ("  x", " x"), ("\n x", "\n x"), (" ", ""), ("", "")],
)
def test_one_leading_space_is_not_part_of_the_text(raw_text: str, text: str) -> None:
    result = answer(raw_text)
    assert (result.raw_text, result.text) == (raw_text, text)
    assert result.to_json()["text"] == text and result.to_json()["raw_text"] == raw_text


@pytest.fixture
def spaced(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A model whose answers all begin with a space, as those of Llama's tokenizer in byte form."""
    push, seen = Detokenizer.push, set[int]()

    def with_space(self: Detokenizer, token: int) -> str:
        first = id(self) not in seen
        seen.add(id(self))
        return " " * first + push(self, token).lstrip(" " if first else "")

    monkeypatch.setattr(Detokenizer, "push", with_space)
    return pipe


def test_pieces_join_to_the_raw_text(spaced: Pipeline, picture: Image.Image) -> None:
    stream = spaced.stream(picture, PROMPT, max_new_tokens=9)
    joined = "".join(stream)
    assert joined.startswith(" ")
    assert stream.result.raw_text == joined and stream.result.text == joined[1:]


def test_vtp_run_prints_the_text(
    spaced: Pipeline,
    exported: Callable[[str], Any],
    picture_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = spaced.generate(picture_file, PROMPT, max_new_tokens=9).text
    folder = str(exported("vispruner").folder)
    assert main([folder, "--image", str(picture_file), "--prompt", PROMPT, "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == wanted + "\n"


# -- nothing to read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"finish_reason": "eos"}, "with its first token"),
        ({"finish_reason": "eos", "token_ids": [5, 6, 2]}, "its 3 tokens have no text that is shown"),
        ({"finish_reason": "length", "token_ids": [5]}, "its 1 token has no text"),
        ({"finish_reason": "stop"}, "a stop string came first"),
        ({"finish_reason": "timeout", "token_ids": []}, "larger timeout_ms"),
        ({"finish_reason": "cancelled", "token_ids": []}, "cancelled"),
    ],
)
def test_an_empty_answer_says_why(fields: dict[str, Any], why: str) -> None:
    for raw_text in ("", " ", "\n"):
        assert why in str(answer(raw_text, **fields).why_empty)
    assert answer(" x", **fields).why_empty is None


def test_vtp_run_says_why_it_printed_nothing(
    exported: Callable[[str], Any], picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [str(exported("vispruner").folder), "--image", str(picture_file), "--prompt", PROMPT]
    for json in ([], ["--json"]):  # programs read finish_reason
        assert main([*ask, "--timeout-ms", "1e-6", *json]) == 0
        assert ("the answer is empty: the time was over" in capsys.readouterr().err) == (not json)
