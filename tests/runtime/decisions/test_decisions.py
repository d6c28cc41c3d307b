"""Decisions are transformers' own probabilities at the prompt's last place, and no step is taken for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vtp.engines import UsageError, VtpError
from vtp.export.exporter import Request, export
from vtp.runtime import Decision, Pipeline
from vtp.runtime.decisions.labels import label_tokens
from vtp.runtime.decisions.question import Question
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.scheduler import Closed, QueueFull, Scheduler
from vtp.runtime.stages.runner import StageRunner
from vtp.scenes import model_dir
from vtp.scenes.exam import Item, held_out
from vtp.scenes.generator.pictures import COLORS, PLACES, SHAPES

from ...once import Once
from ...stand_ins.prompt_gate import Gate
from ..prompt.tokenizer_kinds import TOKENIZERS, spec_for

OPTIONS = {"shape": list(SHAPES), "color": list(COLORS), "where": list(PLACES), "count": list("0123456789")}


@pytest.fixture(scope="module")
def builtin(once: Once) -> Path:
    """The built-in model's unpruned bundle."""
    return once.folder("builtin-none", lambda part: export(Request(part, method="none")))


def probabilities(processor: Any, model: Any, image: Image.Image, prompt: str) -> torch.Tensor:
    """transformers' distribution over the vocabulary at the place after a prompt."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with torch.no_grad():
        logits = model(**processor(images=image, text=text, return_tensors="pt")).logits[0, -1]
    return logits.double().softmax(-1)


def first_tokens(tokenizer: Any, words: list[str], whole: bool) -> list[int]:
    """The tokens that hold words' first letters, or `whole` words, by transformers' offsets, with and without
    a space."""
    found = set()
    for word in words:
        for context in ("\n", ":", ": ", "a "):
            encoded = tokenizer(context + word, return_offsets_mapping=True, add_special_tokens=False)
            spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            least = len(context) + (len(word) if whole else 1)
            found |= {number for number, (start, end) in spans if start <= len(context) and end >= least}
    return sorted(found)


# -- numbers -------------------------------------------------------------------------------------------------


def test_they_are_what_transformers_finds(builtin: Path) -> None:
    """Of all kinds and both labellings, on pictures the model never saw."""
    model = LlavaForConditionalGeneration.from_pretrained(model_dir()).eval()
    processor: Any = AutoProcessor.from_pretrained(model_dir())
    yes_no = [["yes", "Yes"], ["no", "No"]]
    with Pipeline.load(builtin, threads=1, vision_feature_cache=1) as pipe:
        item = next(iter(held_out(1, seed=11)))
        question = item.prompt
        asked: list[tuple[Decision, str, list[list[str]]]] = [
            (
                pipe.decide(item.image, question, ["red", "green", "pink"], labels="texts"),
                question,
                [["red"], ["green"], ["pink"]],
            ),
            (
                pipe.decide(item.image, question, ["red", "not red"]),
                f"{question}\nA) red\nB) not red\nAnswer with the letter of one option only.",
                [["A"], ["B"]],
            ),
            (
                pipe.decide(item.image, question, {"red": "as blood", "blue": ""}),
                f"{question}\nA) red: as blood\nB) blue\nAnswer with the letter of one option only.",
                [["A"], ["B"]],
            ),
            (
                pipe.decide(item.image, question, ["none", "some", "all"], kind="score"),
                f"{question}\n0) none\n1) some\n2) all\nAnswer with the number of one level only.",
                [["0"], ["1"], ["2"]],
            ),
            (pipe.decide(item.image, question), f"{question}\nAnswer with yes or no only.", yes_no),
            (
                pipe.decide(item.image, question, {"no": "never"}, kind="yes_no"),
                f"{question}\nno) never\nAnswer with yes or no only.",
                yes_no,
            ),
        ]
        for decision, prompt, words in asked:
            everything = probabilities(processor, model, item.image, prompt)
            labels = [first_tokens(processor.tokenizer, some, prompt != question) for some in words]
            masses = [float(everything[some].sum()) for some in labels]
            wanted = [mass / sum(masses) for mass in masses]
            assert list(decision.probabilities.values()) == pytest.approx(wanted, rel=5e-3)
            assert decision.label_mass == pytest.approx(sum(masses), rel=5e-3)
            assert decision.answer == list(decision.probabilities)[int(np.argmax(wanted))]
            if decision.kind == "score":
                assert list(decision.probabilities) == ["0", "1", "2"]
                assert decision.score == pytest.approx(wanted[1] + 2 * wanted[2], rel=5e-3)
            else:
                assert decision.score is None
        hot = pipe.decide(item.image, question, ["red", "green", "pink"], labels="texts", temperature=2.0)
    roots = np.sqrt(list(asked[0][0].probabilities.values()))
    assert list(hot.probabilities.values()) == pytest.approx((roots / roots.sum()).tolist())
    assert hot.label_mass == pytest.approx(asked[0][0].label_mass)


def ask(pipe: Pipeline, item: Item) -> Decision:
    return pipe.decide(item.image, item.prompt, OPTIONS[item.kind], labels="texts")


def test_the_built_in_model_decides_as_it_answers(builtin: Path) -> None:
    """Its answers' words are the options: the likeliest is what it writes, and they have nearly all mass."""
    with Pipeline.load(builtin, threads=1, vision_feature_cache=1) as pipe:
        for item in held_out(24, seed=7):
            decision = ask(pipe, item)
            assert decision.answer == pipe.generate(item.image, item.prompt, max_new_tokens=8).text.strip()
            assert decision.label_mass > 0.99
            assert sum(decision.probabilities.values()) == pytest.approx(1)


def test_no_step_is_taken_and_the_encoder_runs_once(builtin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("a decision takes no step")

    monkeypatch.setattr(StageRunner, "step_rows", fail)
    items = list(held_out(4, seed=7))
    with Pipeline.load(builtin, threads=1, vision_feature_cache=1) as pipe:
        decisions = [ask(pipe, item) for item in items]
        with Scheduler(pipe, slots=2) as scheduler:
            tickets = [
                scheduler.decide(item.image, item.prompt, OPTIONS[item.kind], labels="texts")
                for item in items
            ]
            for ticket, alone in zip(tickets, decisions, strict=True):
                found = ticket.result(60)
                assert found.probabilities == alone.probabilities and found.label_mass == alone.label_mass
                assert found.timings.reused_stages == ["vision_encoder", "projector"] and ticket.done
            assert scheduler.stats().steps == 0 and scheduler.stats().requests == 4
    for decision in decisions[1:]:
        assert decision.timings.reused_stages == ["vision_encoder", "projector"]
    first = decisions[0]
    assert first.timings.reused_stages == [] and first.timings.stages["vision_encoder"] > 0
    assert first.timings.total == first.timings.ttft > 0 and first.visual_tokens == (576, 576)
    assert json.loads(json.dumps(first.to_json()))["probabilities"] == first.probabilities


# -- beside others -------------------------------------------------------------------------------------------


def test_answers_beside_decisions_stay_as_they_are(
    pipe: Pipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = pipe.generate(picture, "what is it ?", max_new_tokens=20)
    wanted = pipe.decide(picture, "which ?", ["red", "blue"], keep_tokens=3)
    assert wanted.visual_tokens == (16, 3) and len(wanted.kept) == 3 and wanted.prompt_tokens > 5
    gate = Gate(monkeypatch)
    with Scheduler(pipe, slots=2) as scheduler:
        answers, decisions = [], []
        for _ in range(4):
            answers.append(scheduler.submit(picture, "what is it ?", max_new_tokens=20))
            decisions.append(scheduler.decide(picture, "which ?", ["red", "blue"], keep_tokens=3))
        gate.open()
        for answer, decision in zip(answers, decisions, strict=True):
            assert answer.result(60).token_ids == alone.token_ids
            assert decision.result(60).probabilities == wanted.probabilities

        async def wait() -> Decision:
            return await scheduler.decide(picture, "which ?", ["red", "blue"], keep_tokens=3)

        assert asyncio.run(wait()).probabilities == wanted.probabilities
    with pytest.raises(Closed):
        scheduler.decide(picture, "which ?", ["red", "blue"])


def test_bounds_of_the_queue_and_of_time(
    pipe: Pipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with Scheduler(pipe, slots=1, queue=1) as scheduler:
        first = scheduler.decide(picture, "which ?", ["red", "blue"])
        second = scheduler.decide(picture, "which ?", ["red", "blue"])
        with pytest.raises(QueueFull):
            scheduler.decide(picture, "which ?", ["red", "blue"])
        second.cancel()
        with pytest.raises(VtpError, match=r"nothing was decided \(cancelled\)"):
            second.result(60)
        with pytest.raises(TimeoutError):
            first.result(0.01)
        gate.open()
        assert first.result(60).answer in ("red", "blue")
    with pytest.raises(VtpError, match=r"nothing was decided \(timeout\)"):
        pipe.decide(picture, "which ?", ["red", "blue"], timeout_ms=1e-6)
    assert pipe.decide(picture, "which ?", ["red", "blue"]).kind == "choice"  # nothing is left claimed


def test_broken_logits_are_no_decision(
    pipe: Pipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtp.runtime.decisions.answer.prefill", lambda *_: np.full(300, np.nan, np.float32))
    with pytest.raises(VtpError, match="NaN or infinite"):
        pipe.decide(picture, "which ?", ["red", "blue"])


# -- labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte_level", "llama", "metaspace_first", "wordpiece"])
def test_letters_have_tokens_with_every_kind_of_tokenizer(name: str, tmp_path: Path) -> None:
    """Each token is the letter, in the vocabulary's own way of writing words; unknown ones are refused."""
    TOKENIZERS[name].save(str(tmp_path / "tokenizer.json"))
    prompter = Prompter(spec_for(None), tmp_path / "tokenizer.json")
    vocabulary = prompter.tokenizer.get_vocab()
    questions = [Question.of("?", ["x", "y"]), Question.of("?", ["x", "y", "z"], "score"), Question.of("?")]
    for question in questions:
        possible = [
            {mark + word for word in words for mark in ("", "Ġ", "▁")} & set(vocabulary)
            | {f"<0x{ord(word):02X}>" for word in words if len(word) == 1} & set(vocabulary)
            for words in question.written
        ]
        if not all(possible):
            refused = pytest.raises(UsageError, match=r"has no token for the label .*labels=\"texts\"")
            with refused:
                label_tokens(question, prompter)
            continue
        for texts, ids in zip(possible, label_tokens(question, prompter), strict=True):
            found = {prompter.tokenizer.id_to_token(number) for number in ids.tolist()}
            assert found and found <= texts


def test_answers_that_begin_alike_are_refused(pipe: Pipeline, picture: Image.Image) -> None:
    for options in (["redish one", "redish two"], ["star", "star "]):
        with pytest.raises(UsageError, match=r"begins with the same token as another.*labels=\"letters\""):
            pipe.decide(picture, "which ?", options, labels="texts")
    assert pipe.decide(picture, "which ?", ["redish one", "redish two"]).answer.startswith("redish")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"question": " "}, "the question is empty"),
    ({"question": 5}, "the question is empty, or no text"),
    ({"kind": "maybe"}, "kind 'maybe' is not known; choose one of yes_no, choice, score"),
    ({"labels": "digits"}, "labels 'digits' is not known; choose one of letters, texts"),
    ({"options": ["a"]}, "1 options are given; give 2 to 26"),
    ({"options": [str(number) for number in range(27)]}, "27 options are given; give 2 to 26"),
    ({"options": list("abcdefghijk"), "kind": "score"}, "11 levels are given; give 2 to 10"),
    ({"options": "ab"}, "the options must be a list of texts, not 'ab'"),
    ({"kind": "choice"}, "the options must be a list of texts, not None"),
    ({"options": ["a", 5]}, "one of the options must be text, not 5"),
    ({"options": ["a", " "]}, "number 2 of the options is empty"),
    ({"options": ["a", "b", "a"]}, "'a' is given twice; the options must differ"),
    ({"options": {"a": 1, "b": ""}}, "a meaning must be text, not 1"),
    ({"options": {"a": "", "b": ""}, "kind": "score"}, "the levels must be a list of texts, from the lowest"),
    ({"options": ["a", "b"], "kind": "yes_no"}, "a yes_no question has no options"),
    ({"options": {"perhaps": "x"}, "kind": "yes_no"}, "a yes_no question has no options"),
    ({"options": ["a", "b" * 5000]}, "one of the options has 5000 characters; give at most 4096"),
    ({"temperature": 0}, r"temperature 0 is not allowed; choose a number above 0"),
    ({"temperature": float("nan")}, "temperature nan is not allowed"),
    ({"temperature": "1"}, "temperature '1' is not allowed"),
    ({"keep_tokens": 5}, "keep_tokens 5 is not in this bundle"),
    ({"timeout_ms": 0}, "timeout_ms 0 is not a number"),
    ({"options": ["<image>", "b"]}, "holds '<image>', a control token"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_questions(pipe: Pipeline, picture: Image.Image, wrong: dict[str, Any], message: str) -> None:
    with Scheduler(pipe, slots=1) as scheduler:
        asks: list[Callable[..., Any]] = [scheduler.decide]
        for ask in asks:
            with pytest.raises(UsageError, match=message) as caught:
                ask(picture, **{"question": "is it red ?", **wrong})
            assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=message):
        pipe.decide(picture, **{"question": "is it red ?", **wrong})
