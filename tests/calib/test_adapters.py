"""What adapters of evaluation harnesses do with a bundle; `make test-evals` runs the harnesses themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtp.calib.adapters import lmms_eval, vlmevalkit
from vtp.calib.adapters.answering import Answerer, Part, generation_options, split_keep
from vtp.engines import UsageError
from vtp.runtime import Pipeline
from vtp.runtime.media.pictures import NO_PICTURE

OPTIONS: dict[str, Any] = {"engine": "ort-cpu", "threads": 1}


def test_a_bundle_answers_parts_as_the_pipeline_does(exported: Any, picture: Image.Image) -> None:
    folder = exported("vispruner").folder
    asked = [Part("image", picture), Part("text", "what is it ?")]
    answerer = Answerer(f"{folder}:3", system="Be brief.", **OPTIONS)
    found = answerer.answer(asked, max_new_tokens=4)
    first = answerer.answer(
        [*asked, Part("text", "a dog", "assistant"), Part("text", "why ?")], max_new_tokens=4
    )
    answerer.pipe.close()
    with Pipeline.load(folder, "ort-cpu", threads=1) as pipe:
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is it ?"}]
        alone = pipe.generate(picture, messages=turns, keep_tokens=3, max_new_tokens=4)
        more = [{"role": "assistant", "content": "a dog"}, {"role": "user", "content": "why ?"}]
        second = pipe.generate(picture, messages=[*turns, *more], keep_tokens=3, max_new_tokens=4)
    assert found.token_ids == alone.token_ids and found.visual_tokens.after == 3
    assert first.token_ids == second.token_ids and first.prompt_tokens == second.prompt_tokens


def test_questions_without_a_picture_are_answered(exported: Any) -> None:
    answerer = Answerer(str(exported("vispruner").folder), **OPTIONS)
    found = answerer.answer([Part("text", "what is it ?")], max_new_tokens=3)
    answerer.pipe.close()
    with Pipeline.load(exported("vispruner").folder, "ort-cpu", threads=1) as pipe:
        assert found.token_ids == pipe.generate(NO_PICTURE, "what is it ?", max_new_tokens=3).token_ids


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"bundle": "{}:5"}, "keeps 3, 6 visual tokens, not 5; choose one of them"),
        ({"bundle": "{}:3", "keep_tokens": 6}, "says 3 tokens and keep_tokens 6; give one of them"),
    ],
)
def test_a_keep_count_that_is_none_is_one_line(exported: Any, arguments: dict, problem: str) -> None:
    bundle = arguments["bundle"].format(exported("vispruner").folder)
    with pytest.raises(UsageError, match=problem):
        Answerer(**{**arguments, "bundle": bundle}, **OPTIONS)


def test_what_is_no_picture_is_one_line(exported: Any) -> None:
    answerer = Answerer(str(exported("vispruner").folder), **OPTIONS)
    with pytest.raises(UsageError, match="a part of kind 'video': a bundle takes text and pictures"):
        answerer.answer([Part("video", "a.mp4"), Part("text", "what ?")])
    answerer.pipe.close()


def test_settings_of_a_harness_are_vtps() -> None:
    greedy = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert generation_options(greedy) == {"max_new_tokens": 16}
    assert generation_options({"until": ["\n\n", ""]}) == {"max_new_tokens": 512, "stop": ["\n\n"]}
    assert generation_options({"until": "ASSISTANT:"})["stop"] == ["ASSISTANT:"]
    hot = generation_options({"temperature": 0.7, "top_p": 0.9, "do_sample": True})
    assert hot == {"max_new_tokens": 512, "temperature": 0.7, "top_p": 0.9}
    assert generation_options({"temperature": 0.7, "do_sample": False}) == {"max_new_tokens": 512}
    with pytest.raises(UsageError, match="num_beams 4: vtp answers with one beam"):
        generation_options({"num_beams": 4})


def test_bundles_are_named() -> None:
    assert split_keep("/a/b:64") == ("/a/b", 64) and split_keep("org/name") == ("org/name", None)
    assert split_keep("c:/bundle") == ("c:/bundle", None)
    assert vlmevalkit.model_name("path/to/my vis:64") == "my-vis-64"
    assert vlmevalkit.model_name("org/LLaVA_1.5@v1") == "LLaVA-1.5-v1"


def test_messages_of_both_harnesses_are_parts() -> None:
    turns = [{"role": "user", "content": [{"type": "image", "url": 1}, {"type": "text", "text": "what ?"}]}]
    assert list(lmms_eval.parts_of(turns)) == [Part("image", 1), Part("text", "what ?")]
    items = [{"type": "text", "value": "Be brief.", "role": "system"}, {"type": "image", "value": "a.png"}]
    assert list(vlmevalkit.parts_of(items)) == [Part("text", "Be brief.", "system"), Part("image", "a.png")]


def test_nothing_of_a_harness_is_imported_beforehand() -> None:
    assert not {"lmms_eval", "vlmeval"} & set(sys.modules)
    for module in (lmms_eval, vlmevalkit):
        with pytest.raises(AttributeError, match="has no attribute 'Other'"):
            module.Other  # noqa: B018
        with pytest.raises(ModuleNotFoundError):
            module.Vtp  # noqa: B018


@pytest.mark.parametrize("words", [[], ["--data", "MME"], ["bundle", "--data", "MME"]])
def test_a_harness_that_is_missing_is_one_line(words: list[str], capsys: Any, tmp_path: Path) -> None:
    assert vlmevalkit.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ("vlmeval is not installed" if words[:1] == ["bundle"] else "no bundle; usage: python -m") in said


def test_help_is_a_usage(capsys: Any) -> None:
    assert vlmevalkit.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m vtp.calib.adapters.vlmevalkit BUNDLE[:K]")
