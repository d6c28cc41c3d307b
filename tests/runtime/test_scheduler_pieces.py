"""Pictures of a request that joins are encoded in pieces, and the others take a step between two of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import VtpError
from vtp.runtime import NO_PICTURE, Pipeline
from vtp.runtime.result import Result, Timings
from vtp.runtime.scheduler import Scheduler, Ticket
from vtp.runtime.stages.runner import StageRunner
from vtp.runtime.stages.stage import Stage

from ..models.tiny_split import save_idefics3
from ..once import Once

TILES = 5  # four, and the picture as a whole
Events = list[str]


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (70, 70, 3), dtype=np.uint8))


PICTURES = [noise(seed) for seed in range(3)]


def said(result: Result) -> tuple[Any, ...]:
    return result.token_ids, result.raw_text, result.kept, result.finish_reason, result.visual_tokens


@pytest.fixture(scope="module")
def tiled(once: Once, saved: Callable[..., Any]) -> Path:
    """A SmolVLM that cuts its pictures into tiles."""
    folder, _ = saved(save_idefics3, kind="smolvlm", tied=True, seed=7)
    wishes = {"method": "vispruner", "keep_tokens": "3,11", "image_size": (56, 56)}
    return once.bundle(folder, max_length=256, verify="none", **wishes)


def endless(pipeline: Pipeline) -> Pipeline:
    """No answer ends before its length does."""
    pipeline.manifest.text.__dict__["eos_token_ids"] = ()
    return pipeline


@pytest.fixture(scope="module")
def pipe(tiled: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiled, threads=1) as pipeline:
        yield endless(pipeline)


@pytest.fixture(scope="module")
def plain(exported: Callable[[str], Any]) -> Iterator[Pipeline]:
    """A family of one tile."""
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipeline:
        yield endless(pipeline)


class Recorder:
    """What the worker does, in order: "encode" for a run of an encoder, "prompt", "step".

    before  called before each run of an encoder, with their number so far
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: Events = []
        self.before: Callable[[int], None] = lambda number: None
        self._go, self._stepping = threading.Event(), threading.Event()
        run, prompt, step = Stage.run, StageRunner.prefill_rows, StageRunner.step_rows

        def ran(stage: Stage, values: dict[str, Any], *more: Any) -> None:
            if stage.info.role == "encoder":
                self.before(self.events.count("encode"))
                self.events.append("encode")
                assert len(values["pixel_values"].numpy()) == 1
            run(stage, values, *more)

        def read(runner: StageRunner, *arguments: Any) -> Any:
            self.events.append("prompt")
            return prompt(runner, *arguments)

        def stepped(runner: StageRunner, *arguments: Any) -> Any:
            self._stepping.set()
            assert self._go.wait(60)
            self.events.append("step")
            return step(runner, *arguments)

        monkeypatch.setattr(Stage, "run", ran)
        monkeypatch.setattr(StageRunner, "prefill_rows", read)
        monkeypatch.setattr(StageRunner, "step_rows", stepped)

    def join(self, beside: Callable[[], Ticket], joining: Callable[[], Ticket]) -> tuple[Ticket, Ticket]:
        """Submit a request, and a second one, with its pictures decoded, while the first takes its step."""
        first = beside()
        assert self._stepping.wait(60)
        self.events.clear()
        second = joining()
        if second._job.loading is not None:
            second._job.loading.result(60)
        self._go.set()
        return first, second


def until_the_prompt(events: Events) -> Events:
    """From the first run of an encoder to the prompt."""
    return events[events.index("encode") : events.index("prompt") + 1]


# -- the order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [1, 3])
def test_steps_of_others_lie_between_tiles(
    pipe: Pipeline, pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And between pictures, and before the prompt; the answers are those of each request alone."""
    asked = PICTURES[:pictures], "what shape ?"
    wanted = [said(pipe.generate(NO_PICTURE, "how many ?", max_new_tokens=60))]
    wanted.append(said(pipe.generate(*asked, max_new_tokens=9)))
    recorder = Recorder(monkeypatch)
    with Scheduler(pipe, slots=3) as scheduler:
        tickets = recorder.join(
            lambda: scheduler.submit(NO_PICTURE, "how many ?", max_new_tokens=60),
            lambda: scheduler.submit(*asked, max_new_tokens=9),
        )
        assert [said(ticket.result(60)) for ticket in tickets] == wanted
    assert until_the_prompt(recorder.events) == ["encode", "step"] * (TILES * pictures) + ["prompt"]


def test_steps_of_others_lie_between_pictures_of_one_tile(
    plain: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = said(plain.generate(PICTURES, "what shape ?", max_new_tokens=9))
    recorder = Recorder(monkeypatch)
    with Scheduler(plain, slots=2) as scheduler:
        _, second = recorder.join(
            lambda: scheduler.submit(NO_PICTURE, "how many ?", max_new_tokens=60),
            lambda: scheduler.submit(PICTURES, "what shape ?", max_new_tokens=9),
        )
        assert said(second.result(60)) == wanted
    assert until_the_prompt(recorder.events) == ["encode", "step"] * len(PICTURES) + ["prompt"]


def test_a_prompt_without_work_for_the_encoder_joins_at_once(
    plain: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    with Scheduler(plain, slots=2) as scheduler:
        tickets = recorder.join(
            lambda: scheduler.submit(NO_PICTURE, "how many ?", max_new_tokens=9),
            lambda: scheduler.submit(NO_PICTURE, "what ?", max_new_tokens=9),
        )
        assert all(ticket.result(60).token_ids for ticket in tickets)
    assert recorder.events[:3] == ["step", "prompt", "step"]


def test_requests_join_in_their_order(pipe: Pipeline) -> None:
    """More requests than slots, with and without pictures: each says what it says alone."""
    asked: list[tuple[Any, str, dict[str, Any]]] = [
        (
            NO_PICTURE if place % 4 == 3 else PICTURES[: 1 + place % 2],
            f"what{' shape' * (place % 3)} ?",
            {"max_new_tokens": 3 + place, "keep_tokens": (3, 11)[place % 2]},
        )
        for place in range(12)
    ]
    alone = [said(pipe.generate(image, words, **options)) for image, words, options in asked]
    with Scheduler(pipe, slots=3) as scheduler:
        tickets = [scheduler.submit(image, words, **options) for image, words, options in asked]
        assert [said(ticket.result(60)) for ticket in tickets] == alone
        stats = scheduler.stats()
    assert stats.stepped_rows > stats.steps > 0 and stats.requests == len(asked)


# -- what ends one early -------------------------------------------------------------------------------------


def test_cancelled_while_it_is_encoded_it_frees_its_slot_before_the_next_piece(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = said(pipe.generate(NO_PICTURE, "how many ?", max_new_tokens=60))
    recorder, tickets = Recorder(monkeypatch), list[Ticket]()
    with Scheduler(pipe, slots=2, queue=1) as scheduler:

        def joining() -> Ticket:
            tickets.append(scheduler.submit(PICTURES[:1], "what ?", max_new_tokens=9))
            return tickets[0]

        recorder.before = lambda number: tickets[0].cancel() if number == 1 else None
        first, second = recorder.join(
            lambda: scheduler.submit(NO_PICTURE, "how many ?", max_new_tokens=60), joining
        )
        gone = second.result(60)
        assert scheduler.submit(NO_PICTURE, "what ?", max_new_tokens=3).result(60).token_ids
        assert said(first.result(60)) == wanted
    assert gone.finish_reason == "cancelled" and not gone.token_ids
    assert recorder.events.count("encode") == 2  # the one in which it was cancelled was the last


def test_an_error_in_a_piece_is_that_requests_alone(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [said(pipe.generate(NO_PICTURE, "how many ?", max_new_tokens=60))]
    wanted.append(said(pipe.generate(PICTURES[:1], "what ?", max_new_tokens=5)))
    recorder = Recorder(monkeypatch)

    def break_down(number: int) -> None:
        if number == 2:
            raise RuntimeError("the third tile")

    with Scheduler(pipe, slots=2) as scheduler:
        recorder.before = break_down
        first, second = recorder.join(
            lambda: scheduler.submit(NO_PICTURE, "how many ?", max_new_tokens=60),
            lambda: scheduler.submit(PICTURES[:1], "what ?", max_new_tokens=5),
        )
        with pytest.raises(VtpError, match="the third tile"):
            second.result(60)
        assert recorder.events.count("encode") == 2
        recorder.before = lambda number: None
        again = scheduler.submit(PICTURES[:1], "what ?", max_new_tokens=5)
        assert [said(first.result(60)), said(again.result(60))] == wanted
        assert scheduler.stats().failed == 1


def test_closing_ends_one_that_joins(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, entered = Recorder(monkeypatch), threading.Event()
    with Scheduler(pipe, slots=2) as scheduler:
        recorder.before = lambda number: scheduler.cancel() if number == 1 else entered.set()
        ticket = scheduler.submit(PICTURES[:1], "what ?", max_new_tokens=5)
        assert entered.wait(60) and ticket.result(60).finish_reason == "cancelled"
    assert recorder.events == ["encode"] * 2


# -- what is kept --------------------------------------------------------------------------------------------


def test_the_vision_feature_cache_serves_tiles(
    tiled: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests about one picture encode it once, and neither waits for steps in vain."""
    wanted = said(pipe.generate(PICTURES[:1], "what ?", max_new_tokens=5))
    recorder = Recorder(monkeypatch)
    recorder._go.set()
    with Scheduler.load(tiled, threads=1, slots=2, vision_feature_cache=2) as scheduler:
        endless(scheduler.pipeline)
        results = [scheduler.submit(PICTURES[:1], "what ?", max_new_tokens=5).result(60) for _ in range(2)]
    assert [said(one) for one in results] == [wanted] * 2
    assert recorder.events.count("encode") == TILES
    assert "vision_encoder" in results[1].timings.reused_stages and not results[0].timings.reused_stages


def test_a_run_of_all_tiles_gives_the_same(tiled: Path, cpu_engine: str) -> None:
    """On every CPU engine; where one run's sums differ, by rounding."""
    with Pipeline.load(tiled, cpu_engine, threads=1) as pipeline, pipeline.claimed() as runner:
        (encoder,) = [stage for stage in runner.stages("image", 3) if stage.info.role == "encoder"]
        pixels = np.random.default_rng(0).normal(size=(TILES, 3, 28, 28)).astype(np.float32)
        values = {"pixel_values": runner.any_engine.put(pixels)}
        encoder.run(values)
        found = runner.encode(3, [pixels], 1, Timings())
        with pytest.raises(StopIteration) as done:
            for _ in range(TILES + 1):
                next(found)
        pieces: dict[str, Any] = done.value.value
        for name in ("image_features", "attention_scores"):
            np.testing.assert_allclose(pieces[name].numpy(), values[name].numpy(), rtol=1e-4, atol=1e-5)
        assert runner.pictures_together == 1
        binding = encoder.bind_whole({"pixel_values": values["pixel_values"]})  # as a GPU replays it
        assert binding is not None
        binding.run()
        found_whole = binding.outputs["image_features"].numpy()
        np.testing.assert_array_equal(found_whole, values["image_features"].numpy())
