"""Log-probabilities are those of transformers' own logits, and belong to the tokens of the visible text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vtp.engines import UsageError
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline, Result
from vtp.runtime.generation.logprobs import log_softmax, most_likely
from vtp.runtime.scheduler import Scheduler
from vtp.scenes import model_dir
from vtp.scenes.exam import held_out

from ...once import Once

PROMPT = "what shape is the red ?"


@pytest.fixture(scope="module")
def builtin(once: Once) -> Path:
    """The built-in model's unpruned bundle."""
    return once.folder("builtin-none", lambda part: export(Request(part, method="none")))


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_log_softmax_equals_torch(scale: float, dtype: type) -> None:
    logits = (np.random.default_rng(1).standard_normal(5000) * scale).astype(dtype)
    wanted = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    np.testing.assert_allclose(log_softmax(logits), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 5, 20, 40])
def test_the_most_likely_come_first_and_of_equals_the_lower_id(count: int) -> None:
    scores = np.random.default_rng(2).integers(0, 6, 30).astype(np.float64)
    wanted = sorted(range(30), key=lambda place: (-scores[place], place))[:count]
    assert most_likely(scores, count).tolist() == wanted


@pytest.mark.parametrize("count", [0, 5, 20])
def test_answers_say_what_transformers_finds(builtin: Path, count: int) -> None:
    """The prompt and the answer in one forward pass of the unmodified model; of pictures it never saw."""
    model = LlavaForConditionalGeneration.from_pretrained(model_dir()).eval()
    processor: Any = AutoProcessor.from_pretrained(model_dir())
    with Pipeline.load(builtin, threads=1) as pipe:
        for item in held_out(3, seed=11):
            plain = pipe.generate(item.image, item.prompt, max_new_tokens=8)
            result = pipe.generate(item.image, item.prompt, max_new_tokens=8, logprobs=count)
            assert result.token_ids == plain.token_ids and plain.logprobs is None
            content = [{"type": "image"}, {"type": "text", "text": item.prompt}]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = processor(images=item.image, text=text, return_tensors="pt")
            start = inputs.input_ids.shape[1]
            inputs["input_ids"] = torch.cat([inputs.input_ids, torch.tensor([result.token_ids])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs.input_ids)
            with torch.no_grad():
                wanted = model(**inputs).logits[0, start - 1 :].double().log_softmax(-1)
            assert result.finish_reason == "eos" and result.logprobs is not None
            assert [entry.id for entry in result.logprobs] == result.token_ids[:-1]
            for place, entry in enumerate(result.logprobs):
                assert entry.logprob == pytest.approx(float(wanted[place, entry.id]), abs=2e-3)
                values, ids = wanted[place].topk(max(count, 1))
                assert entry.id == int(ids[0])  # greedy
                assert [other.logprob for other in entry.top] == pytest.approx(
                    values[:count].tolist(), abs=2e-3
                )
                likely = [other.id for other in entry.top if other.logprob > -8]  # below, ties are too close
                assert likely == ids[: len(likely)].tolist()
            assert b"".join(entry.bytes for entry in result.logprobs).decode() == result.raw_text


# -- which tokens --------------------------------------------------------------------------------------------


def shown(result: Result) -> list[int]:
    assert result.logprobs is not None
    return [entry.id for entry in result.logprobs]


def test_sampled_tokens_have_the_raw_distribution(endless: Pipeline, picture: Image.Image) -> None:
    """Temperature, top-p and penalties choose the token, and do not change what is said of it."""
    greedy = endless.generate(picture, PROMPT, max_new_tokens=1, logprobs=20).logprobs
    assert greedy
    for seed in range(6):
        options: dict[str, Any] = {"temperature": 5.0, "seed": seed, "repetition_penalty": 1.7}
        first = endless.generate(picture, PROMPT, max_new_tokens=1, logprobs=20, **options).logprobs
        assert first and first[0].top == greedy[0].top
        alternatives = {entry.id: entry.logprob for entry in first[0].top}
        assert alternatives.get(first[0].id, first[0].logprob) == first[0].logprob


def test_every_way_to_ask_says_the_same(endless: Pipeline, picture: Image.Image) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "logprobs": 3}
    wanted = endless.generate(picture, PROMPT, **options)
    assert wanted.logprobs and shown(wanted) == wanted.token_ids
    stream = endless.stream(picture, PROMPT, **options)
    lengths = []
    for piece in stream:
        assert piece and stream.logprobs == wanted.logprobs[: len(stream.logprobs)]
        lengths.append(len(stream.logprobs))
    assert lengths == sorted(lengths) and lengths[0] >= 1
    assert stream.logprobs == wanted.logprobs
    batch = endless.generate_batch([picture] * 3, [PROMPT, "what color is it ?", PROMPT], **options)
    for row in (0, 2):  # a batch of three rows may differ in the last bits
        assert batch[row].logprobs is not None and batch[row].token_ids == wanted.token_ids
        for one, other in zip(batch[row].logprobs or [], wanted.logprobs, strict=True):
            assert one.id == other.id and one.logprob == pytest.approx(other.logprob, abs=1e-4)
    with Scheduler(endless, slots=3) as scheduler:
        tickets = [scheduler.submit(picture, PROMPT, **options) for _ in range(3)]
        without = scheduler.submit(picture, PROMPT, max_new_tokens=12)
        for ticket in tickets:
            seen = ""
            for piece in ticket:
                seen += piece
                assert len("".join(entry.token for entry in ticket.logprobs)) >= len(seen)
            found = ticket.result(60)
            assert found.token_ids == wanted.token_ids and ticket.logprobs == found.logprobs
            for one, other in zip(ticket.logprobs, wanted.logprobs, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert without.result(60).logprobs is None and without.logprobs == []
        assert without.result(60).token_ids == wanted.token_ids


def test_in_an_event_loop(endless: Pipeline, picture: Image.Image) -> None:
    async def read(scheduler: Scheduler) -> tuple[int, Result]:
        ticket, most = scheduler.submit(picture, PROMPT, max_new_tokens=9, logprobs=0), 0
        async for _ in ticket:
            most = len(ticket.logprobs)
        return most, await ticket

    with Scheduler(endless, slots=2) as scheduler:
        most, result = asyncio.run(read(scheduler))
    assert most == len(shown(result)) == 9


def test_what_a_stop_string_cuts_off_has_no_entry(endless: Pipeline, picture: Image.Image) -> None:
    whole = endless.generate(picture, PROMPT, max_new_tokens=20, logprobs=0)
    stop = whole.raw_text[9:14]
    at = whole.raw_text.index(stop)
    result = endless.generate(picture, PROMPT, max_new_tokens=20, logprobs=0, stop=stop)
    assert result.finish_reason == "stop" and result.raw_text == whole.raw_text[:at]
    assert 0 < len(shown(result)) < len(result.token_ids)
    assert shown(result) == result.token_ids[: len(shown(result))]
    decode = endless._prompter.tokenizer.decode
    assert len(decode(shown(result))) >= at >= len(decode(shown(result)[:-1]))


def test_a_stop_string_that_stays_open_holds_nothing_back(endless: Pipeline, picture: Image.Image) -> None:
    whole = endless.generate(picture, PROMPT, max_new_tokens=6, logprobs=0)
    result = endless.generate(picture, PROMPT, max_new_tokens=6, logprobs=0, stop=whole.raw_text[-3:] + "~")
    assert result.raw_text == whole.raw_text and result.logprobs == whole.logprobs


def test_a_cancelled_answer_has_those_of_its_text(endless: Pipeline, picture: Image.Image) -> None:
    stream = endless.stream(picture, PROMPT, max_new_tokens=40, logprobs=1)
    for place, _ in enumerate(stream):
        if place == 2:
            stream.cancel()
    result = stream.result
    assert result.finish_reason == "cancelled" and 3 <= len(shown(result)) < 40
    assert shown(result) == result.token_ids[: len(shown(result))]


def test_json(endless: Pipeline, picture: Image.Image) -> None:
    result = endless.generate(picture, PROMPT, max_new_tokens=2, logprobs=2)
    first = result.to_json()["logprobs"][0]
    assert set(first) == {"token", "id", "bytes", "logprob", "top"}
    assert bytes(first["bytes"]).decode(errors="replace") == first["token"] and len(first["top"]) == 2
    assert set(first["top"][0]) == {"token", "id", "bytes", "logprob"}
    assert "logprobs" not in endless.generate(picture, PROMPT, max_new_tokens=1).to_json()


@pytest.mark.parametrize("bad", [-1, 21, 1.0, True, "3", [1]])
def test_other_numbers_are_refused(
    pipe: Pipeline, picture: Image.Image, bad: Any, exported: Callable[[str], Any]
) -> None:
    for ask in (pipe.generate, pipe.stream):
        with pytest.raises(UsageError, match=r"logprobs .* is not a number of alternatives; give 0"):
            ask(picture, PROMPT, logprobs=bad)
    with pytest.raises(UsageError, match="prompt 1 of 1: logprobs"):
        pipe.generate_batch([picture], [PROMPT], logprobs=bad)
