"""Prompts in the rows of one cache, which come and go: what each says is what it says alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vtp.runtime import Pipeline
from vtp.runtime.generation.options import GenerateOptions
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner
from vtp.runtime.stages.slots import Slots

from .several_pictures import noises

PROMPTS = ["how many ?", "what shape is the red circle on the left ?", "where is it ?"]
Going = list[Any]  # a prompt's number, its next token, that token's position, the logits so far


def check_slots(folder: Path, engine: str, size: tuple[int, int]) -> None:
    """A second prompt joins after two steps of the first; that one leaves, and the second moves to its row;
    the third takes the row that the second had."""
    with Pipeline.load(folder, engine, 1) as pipe, pipe.claimed() as runner:
        alone = [_read(pipe, runner, place, size) for place in range(3)]
        for place in range(3):
            alone[place] = _read(pipe, runner, place, size)
            for _ in range(5):
                _step(pipe, runner, [alone[place]])
        slots = Slots(runner, 3)
        rows = [_read(pipe, slots.row(0), 0, size)]
        for _ in range(2):
            _step(pipe, slots.first(1), rows)
        rows.append(_read(pipe, slots.row(1), 1, size))
        for _ in range(2):
            _step(pipe, slots.first(2), rows)
        slots.move(1, 0)
        over = rows.pop(0)
        rows.append(_read(pipe, slots.row(1), 2, size))
        for _ in range(2):
            _step(pipe, slots.first(2), rows)
        for row in (over, *rows):
            for found, wanted in zip(row[3], alone[row[0]][3], strict=False):
                np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
        assert [len(row[3]) for row in (over, *rows)] == [5, 5, 3] and slots.copies == 1


def _read(pipe: Pipeline, part: StageRunner, place: int, size: tuple[int, int]) -> Going:
    picture = noises(3, *size)[place]
    request = pipe.prepare(picture, PROMPTS[place], None, GenerateOptions()).request
    request.load()
    values = part.prefill_rows(request.keep, request.pictures.pixels, [request.row], Timings())
    logits = values["logits"].numpy()[0, 0]
    return [place, int(logits.argmax()), int(values["next_position"].numpy()[0]), [logits]]


def _step(pipe: Pipeline, part: StageRunner, rows: list[Going]) -> None:
    keep = pipe.manifest.visual.default_keep
    logits = part.step_rows(keep, [row[1] for row in rows], [row[2] for row in rows])
    for row, found in zip(rows, logits.copy(), strict=True):
        row[1:3] = int(found.argmax()), row[2] + 1
        row[3].append(found)
