"""Many requests at once say what each says alone, whoever joins, leaves or fails beside them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import UsageError, VtpError, capabilities
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.result import Result
from vtp.runtime.scheduler import Scheduler, Ticket
from vtp.runtime.stages.runner import StageRunner

from ..stand_ins.prompt_gate import Gate

WORDS = ["what", "shape", "is", "the", "red", "blue", "circle", "star", "left", "how", "many", "where", "?"]
Asked = tuple[Any, str, dict[str, Any]]


def noise(seed: int) -> Image.Image:
    size = (40 + 20 * seed, 90, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


PICTURES = [noise(seed) for seed in range(4)]


def said(result: Result) -> tuple[Any, ...]:
    return (
        *(result.token_ids, result.raw_text, result.kept, result.finish_reason),
        *(result.prompt_tokens, result.visual_tokens),
    )


def requests(pipe: Pipeline, count: int, seed: int) -> list[Asked]:
    """Unequal prompts and lengths, every keep-count, some sampled, some with stop strings."""
    draw = random.Random(seed)
    made: list[Asked] = []
    for place in range(count):
        options: dict[str, Any] = {
            "max_new_tokens": draw.randint(1, 30),
            "keep_tokens": draw.choice(pipe.manifest.visual.keep),
        }
        if draw.random() < 0.4:
            options |= {"temperature": 1.2, "top_p": 0.9, "seed": place}
        if draw.random() < 0.3:
            options |= {"stop": [draw.choice("aeiost"), "zz"]}
        if draw.random() < 0.3:
            options |= {"repetition_penalty": 1.3}
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(1, 25)))
        made.append((draw.choice(PICTURES), prompt, options))
    return made


def ask(pipe: Pipeline, asked: Asked) -> Result:
    return pipe.generate(asked[0], asked[1], **asked[2])


def submit(scheduler: Scheduler, asked: Asked) -> Ticket:
    return scheduler.submit(asked[0], asked[1], **asked[2])


# -- equal answers -------------------------------------------------------------------------------------------

SHARED = ["none", "vispruner", "original", "adaptprune", "fastv", "siglip", "qwen2", "jetpack6"]


@pytest.mark.parametrize("name", SHARED)
def test_answers_are_those_of_each_request_alone(
    exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, name: str, cpu_engine: str
) -> None:
    """Every site and target: requests of unequal length join and leave while others decode."""
    folder = exported(name).folder
    if open_bundle(folder).manifest.target not in capabilities(cpu_engine).targets:
        pytest.skip(f"{cpu_engine} does not run the target of {name}")
    with Pipeline.load(folder, cpu_engine, 1) as pipe:
        asked = requests(pipe, 24, seed=1)
        alone = [said(ask(pipe, one)) for one in asked]
        gate = Gate(monkeypatch)
        with Scheduler(pipe, slots=3) as scheduler:
            assert scheduler.in_turn is None and scheduler.slots == 3
            tickets = [submit(scheduler, one) for one in asked]
            gate.open()
            assert [said(ticket.result(60)) for ticket in tickets] == alone
            stats = scheduler.stats()
        assert stats.stepped_rows > stats.steps > 0  # they did share steps
        assert stats.tokens == sum(len(one[0]) for one in alone)
        assert said(ask(pipe, asked[0])) == alone[0]  # the pipeline is back


@pytest.mark.parametrize("seed", range(3))
def test_random_joins_leaves_and_cancels(endless: Pipeline, seed: int) -> None:
    """Those that end are whole; those that were cancelled hold a beginning of their answer."""
    draw = random.Random(seed)
    asked = requests(endless, 40, seed=seed + 10)
    alone = [ask(endless, one) for one in asked]
    with Scheduler(endless, slots=4) as scheduler:
        tickets: list[Ticket] = []
        cancelled = set()
        for place, one in enumerate(asked):
            tickets.append(submit(scheduler, one))
            while draw.random() < 0.3:
                victim = draw.randrange(len(tickets))
                cancelled.add(victim)
                tickets[victim].cancel()
            if draw.random() < 0.2:
                tickets[draw.randrange(place + 1)].result(60)
        results = [ticket.result(60) for ticket in tickets]
    for place, (found, wanted) in enumerate(zip(results, alone, strict=True)):
        if found.finish_reason == "cancelled":
            assert place in cancelled
            assert found.token_ids == wanted.token_ids[: len(found.token_ids)]
            assert wanted.raw_text.startswith(found.raw_text)
        else:
            assert said(found) == said(wanted)
    assert len([one for one in results if one.finish_reason != "cancelled"]) >= 40 - len(cancelled) > 0


def test_rows_fill_their_caches_each_on_its_own(endless: Pipeline) -> None:
    asked: list[Asked] = [
        (PICTURES[0], "how many ?" + " red" * count, {"max_new_tokens": 500}) for count in (60, 5, 30)
    ]
    alone = [said(ask(endless, one)) for one in asked]
    with Scheduler(endless, slots=2) as scheduler:
        assert [said(submit(scheduler, one).result(60)) for one in asked] == alone
        tickets = [submit(scheduler, one) for one in asked]
        assert [said(ticket.result(60)) for ticket in tickets] == alone
    assert {one[3] for one in alone} == {"length"}


def test_conversations_and_several_pictures(pipe: Pipeline) -> None:
    talk = [
        {"role": "user", "content": "what ?"},
        {"role": "assistant", "content": "a star"},
        {"role": "user", "content": "and how many ?"},
    ]
    wanted = said(pipe.generate(PICTURES[:2], messages=talk, max_new_tokens=9))
    with Scheduler(pipe, slots=2) as scheduler:
        beside = scheduler.submit(PICTURES[3], "where ?", max_new_tokens=30)
        found = scheduler.submit(PICTURES[:2], messages=talk, max_new_tokens=9)
        assert said(found.result(60)) == wanted and beside.result(60).token_ids


@pytest.mark.parametrize("caches", [{"vision_feature_cache": 2}, {"prefix_caching": True}])
def test_caches_serve_all_slots(
    exported: Callable[[str], Any], pipe: Pipeline, caches: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [(PICTURES[place % 2], WORDS[place % 5] + " ?", {"max_new_tokens": 12}) for place in range(16)]
    alone = [said(ask(pipe, one)) for one in asked]
    with Scheduler.load(exported("vispruner").folder, threads=1, slots=4, **caches) as scheduler:
        gate = Gate(monkeypatch)
        tickets = [submit(scheduler, one) for one in asked]
        gate.open()
        results = [ticket.result(60) for ticket in tickets]
        copies = scheduler.stats().copies
    assert [said(one) for one in results] == alone
    if "prefix_caching" in caches:
        assert all(one.timings.reused_tokens > 1 for one in results[2:]) and copies
    else:
        assert all("vision_encoder" in one.timings.reused_stages for one in results[2:])


# -- in turn -------------------------------------------------------------------------------------------------


def test_graphs_of_batch_one_are_served_in_turn(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(pipe, 8, seed=4)
    alone = [said(ask(pipe, one)) for one in asked]
    monkeypatch.setattr(StageRunner, "rows_together", property(lambda _: 1))
    with Scheduler(pipe, slots=4) as scheduler:
        assert scheduler.slots == 1 and "one prompt at a time on ort-cpu" in str(scheduler.in_turn)
        tickets = [submit(scheduler, one) for one in asked]
        assert [said(ticket.result(60)) for ticket in tickets] == alone
        assert scheduler.stats().stepped_rows == scheduler.stats().steps


def test_engines_that_share_no_rows_are_served_in_turn(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StageRunner, "shares_rows", property(lambda _: False))
    with Scheduler(pipe) as scheduler:
        assert scheduler.slots == 1 and "rows cannot be used one by one" in str(scheduler.in_turn)


# -- memory and copies ---------------------------------------------------------------------------------------


def test_memory_is_that_of_the_slots(pipe: Pipeline) -> None:
    before = sum(cache.bytes for cache in pipe._open_runner().caches.values())
    kv = pipe.manifest.graphs["decoder.onnx"].kv
    assert kv is not None
    assert before == 2 * len(kv.layers) * kv.heads * kv.capacity * kv.head_dim * 4
    with Scheduler(pipe, slots=5) as scheduler:
        assert scheduler.cache_bytes == 5 * before
    assert sum(cache.bytes for cache in pipe._open_runner().caches.values()) == before


def test_equal_lengths_copy_nothing(endless: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read in place; rows are moved only into holes, which equal lengths leave at the end."""
    with Scheduler(endless, slots=2) as scheduler:
        for _ in range(3):
            scheduler.submit(PICTURES[0], "how ?", max_new_tokens=5).result(60)
        assert (scheduler.stats().copies, scheduler.stats().copied_bytes) == (0, 0)
        gate = Gate(monkeypatch)
        short = scheduler.submit(PICTURES[0], "how ?", max_new_tokens=5)
        assert gate.entered.acquire(timeout=60)
        longer = scheduler.submit(PICTURES[1], "how many ?", max_new_tokens=30)
        longer._job.load()
        gate.open()
        short.result(60), longer.result(60)
        assert scheduler.stats().copies == 1 and scheduler.stats().copied_bytes > 0


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"slots": 0}, "slots 0 is not a whole number of at least 1"),
        ({"slots": True}, "slots True is not a whole number"),
        ({"slots": 9}, "slots 9 is more than the 8 prompts that this bundle's graphs take together; choose"),
        ({"queue": -1}, "queue -1 is not a whole number of at least 0"),
        ({"queue": "many"}, "queue 'many' is not a whole number"),
    ],
)
def test_bad_numbers(pipe: Pipeline, numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Scheduler(pipe, **numbers)
    assert "\n" not in str(caught.value)
    assert pipe.generate(PICTURES[0], "how ?", max_new_tokens=1).token_ids  # it is not busy


# -- errors --------------------------------------------------------------------------------------------------


def test_bad_requests_are_refused_at_submit(pipe: Pipeline, tmp_path: Path) -> None:
    bad: list[tuple[Any, Any, dict[str, Any], str]] = [
        ("no.png", "how ?", {}, "no such file"),
        (PICTURES[0], " ", {}, "the prompt is empty"),
        (PICTURES[0], "how ?", {"keep_tokens": 4}, "keep_tokens 4 is not in this bundle"),
        (PICTURES[0], "how ?", {"timeout_ms": 0}, "timeout_ms 0"),
        (PICTURES[0], "red " * 500, {}, "shorten it"),
        (PICTURES[0], None, {}, "either a prompt or messages"),
    ]
    with Scheduler(pipe, slots=2) as scheduler:
        for image, prompt, options, message in bad:
            with pytest.raises(VtpError, match=message):
                scheduler.submit(image, prompt, **options)
        assert scheduler.stats().requests == 0
        assert scheduler.submit(PICTURES[0], "how ?", max_new_tokens=2).result(60).token_ids


def test_a_request_that_fails_ends_alone(pipe: Pipeline, tmp_path: Path) -> None:
    """A picture whose file begins well and is cut off shows when it is decoded, in the worker."""
    good = tmp_path / "good.png"
    PICTURES[1].save(good)
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:2000])
    wanted = said(pipe.generate(good, "how many ?", max_new_tokens=20))
    with pytest.raises(VtpError) as alone:
        pipe.generate(cut, "how ?")
    with Scheduler(pipe, slots=2) as scheduler:
        tickets = [scheduler.submit(path, "how many ?", max_new_tokens=20) for path in (good, cut, good, cut)]
        for place in (0, 2):
            assert said(tickets[place].result(60)) == wanted
        for place in (1, 3):
            with pytest.raises(VtpError) as caught:
                tickets[place].result(60)
            assert str(caught.value) == str(alone.value)
            with pytest.raises(VtpError):
                list(tickets[place])
        assert scheduler.stats().failed == 2


def test_a_broken_sampler_or_step_ends_no_worker(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one row is that request's; one of the shared step is of all that share it."""
    wanted = said(pipe.generate(PICTURES[0], "how many ?", max_new_tokens=20))
    gate = Gate(monkeypatch)
    with Scheduler(pipe, slots=2) as scheduler:
        good = scheduler.submit(PICTURES[0], "how many ?", max_new_tokens=20)
        bad = scheduler.submit(PICTURES[1], "how many ?", max_new_tokens=20)
        bad._job.answer._detokenizer = None  # type: ignore[assignment]
        gate.open()
        with pytest.raises(VtpError, match=r"this request failed: AttributeError: .*push") as caught:
            bad.result(60)
        assert "\n" not in str(caught.value) and said(good.result(60)) == wanted

        def breaks(*_: Any) -> Any:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(StageRunner, "step_rows", breaks)
            tickets = [scheduler.submit(PICTURES[0], "how many ?", max_new_tokens=20) for _ in range(2)]
            for ticket in tickets:
                with pytest.raises(VtpError, match="this request failed: MemoryError"):
                    ticket.result(60)
        assert said(scheduler.submit(PICTURES[0], "how many ?", max_new_tokens=20).result(60)) == wanted


def test_totals(pipe: Pipeline) -> None:
    with Scheduler(pipe, slots=2) as scheduler:
        results = [
            scheduler.submit(PICTURES[place], "how ?", keep_tokens=keep, max_new_tokens=4).result(60)
            for place, keep in enumerate((3, 6, 6))
        ]
        stats = scheduler.stats()
    assert (stats.requests, stats.visual_tokens_before, stats.visual_tokens_kept) == (3, 48, 15)
    assert stats.tokens == sum(len(one.token_ids) for one in results)
    assert stats.prompt_tokens == sum(one.prompt_tokens for one in results)
    wanted = {"queue", "preprocess", "tokenize", "vision_encoder", "pruner", "decoder", "step"}
    assert wanted <= set(stats.stage_seconds) and min(stats.stage_seconds.values()) >= 0
    assert stats.running == stats.waiting == 0
