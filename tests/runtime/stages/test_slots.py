"""The rows of a batch of caches: read one by one, stepped together, moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import VtpError
from vtp.engines.base import Engine
from vtp.runtime import Pipeline
from vtp.runtime.generation.options import GenerateOptions
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner
from vtp.runtime.stages.slots import Slots

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    for seed in range(3)
]
PROMPTS = ["how many ?", "what shape is the red circle on the left ?", "where is it ?"]


@pytest.fixture(params=["vispruner", "adaptprune"])
def runner(
    exported: Callable[[str], Any], request: pytest.FixtureRequest, cpu_engine: str
) -> Iterator[StageRunner]:
    with Pipeline.load(exported(request.param).folder, cpu_engine, 1) as pipe, pipe.claimed() as runner:
        runner.pipe = pipe  # type: ignore[attr-defined]
        yield runner


def read(runner: StageRunner, part: StageRunner, place: int) -> tuple[int, int, np.ndarray]:
    """Read prompt number `place`: its first token, the token's position, the first logits."""
    pipe: Pipeline = runner.pipe  # type: ignore[attr-defined]
    request = pipe.prepare(PICTURES[place], PROMPTS[place], None, GenerateOptions()).request
    request.load()
    values = part.prefill_rows(request.keep, request.pictures.pixels, [request.row], Timings())
    logits = values["logits"].numpy()[0, 0]
    return int(logits.argmax()), int(values["next_position"].numpy()[0]), logits


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def steps_alone(runner: StageRunner, place: int, count: int) -> list[np.ndarray]:
    """Greedy logits of a prompt on the whole runner, batch 1: the first and `count` steps."""
    keep = runner.pipe.manifest.visual.default_keep  # type: ignore[attr-defined]
    token, position, logits = read(runner, runner, place)
    seen = [logits]
    for step in range(count):
        seen.append(runner.step(keep, token, position + step).copy())
        token = int(seen[-1].argmax())
    return seen


def test_rows_step_together_as_each_alone(runner: StageRunner) -> None:
    """The third joins after two steps of the others; then the first leaves, and the last takes its row."""
    keep = runner.pipe.manifest.visual.default_keep  # type: ignore[attr-defined]
    alone = [steps_alone(runner, place, 6) for place in range(3)]
    slots, rows = Slots(runner, 3), list[list[Any]]()  # of each row: prompt, token, position, steps

    def join(place: int) -> None:
        token, position, logits = read(runner, slots.row(len(rows)), place)
        close(logits, alone[place][0])
        rows.append([place, token, position, 0])

    def step() -> None:
        logits = slots.first(len(rows)).step_rows(keep, [row[1] for row in rows], [row[2] for row in rows])
        for row, found in zip(rows, logits, strict=True):
            row[3] += 1
            close(found, alone[row[0]][row[3]])
            row[1:3] = int(found.argmax()), row[2] + 1

    join(0), join(1), step(), step(), join(2), step(), step()
    slots.move(2, 0)
    rows[0] = rows.pop()
    step(), step()
    assert [(row[0], row[3]) for row in rows] == [(2, 4), (1, 6)]
    assert slots.copies == 1
    filled = [cache.lengths for cache in runner.caches.values()]
    assert slots.copied_bytes > 0 and all(lengths[2] + 2 == lengths[0] for lengths in filled)
    slots.close()
    for found, wanted in zip(steps_alone(runner, 1, 6), alone[1], strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_row_is_the_memory_of_the_batch(runner: StageRunner) -> None:
    slots = Slots(runner, 3)
    read(runner, slots.row(1), 0)
    for file, cache in runner.caches.items():
        part = slots.row(1).caches[file]
        assert list(cache.lengths) == [0, part.length, 0] and part.length > 0
        for name, buffer in cache.feeds.items():
            if name.startswith("past"):
                whole, own = buffer.view(), part.feeds[name].view()
                assert np.shares_memory(whole, own) and own.shape == (1, *whole.shape[1:])
                assert not whole[0].any() and not whole[2].any()
                assert whole[1, :, : part.length].any()
    assert slots.bytes == 3 * sum(cache.bytes for cache in slots.row(0).caches.values())


def test_engines_without_rows_say_so() -> None:
    assert not Engine.shares_rows
    for call in (lambda: Engine.rows(object(), None, 0, 1), lambda: Engine.copy_row(object(), None, 0, 1, 2)):  # type: ignore[arg-type]
        with pytest.raises(VtpError, match="use ort-cpu"):
            call()


def test_a_prompt_begins_from_the_row_that_knows_it(exported: Callable[[str], Any]) -> None:
    """Prefix caching over rows: the beginning is copied from the row with the longest one."""
    folder = exported("vispruner").folder
    with Pipeline.load(folder, threads=1) as plain, plain.claimed() as wanted:
        wanted.pipe = plain  # type: ignore[attr-defined]
        alone = [read(wanted, wanted, place)[2] for place in range(3)]
    with Pipeline.load(folder, threads=1, prefix_caching=True) as pipe, pipe.claimed() as runner:
        runner.pipe = pipe  # type: ignore[attr-defined]
        slots = Slots(runner, 3)
        close(read(runner, slots.row(0), 0)[2], alone[0])
        close(read(runner, slots.row(1), 1)[2], alone[1])
        copies = slots.copies
        close(read(runner, slots.row(2), 1)[2], alone[1])
        length = slots.row(1).caches["decoder.onnx"].length
        assert slots.copies == copies + 1
        assert slots.row(2).prefix.reused == length - 1  # type: ignore[union-attr]
        close(read(runner, slots.row(0), 0)[2], alone[0])  # from itself: nothing is copied
        assert slots.copies == copies + 1
