"""A minute of video at 30 frames a second through vtp-watch: how old frames are, memory, how it ends."""

from __future__ import annotations

import json
import signal
import statistics
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ...soak.growth import Sample, grown, look
from .moving import phases, write_video
from .test_command import watching

FPS, SECONDS = 30, 60
PROMPT = "what color is the star ?"


def watched(bundle: Path, video: Path, *more: object) -> tuple[list[Any], list[Sample], list[str], int]:
    """Answers, what the process held once a second, standard error and the exit code; ended by Ctrl-C
    shortly before the video ends."""
    answers: list[Any] = []
    samples: list[Sample] = []
    over = threading.Event()
    with watching(bundle, video, "--prompt", PROMPT, "--json", *more) as watch:

        def sample() -> None:
            while not over.wait(1.0):
                samples.append(look(watch.process.pid))

        answers.append(watch.answer())
        threading.Thread(target=sample, daemon=True).start()
        while answers[-1]["frame"]["stamp_ns"] < (SECONDS - 3) * 10**9:
            answers.append(watch.answer())
        over.set()
        left, said = watch.end(signal.SIGINT)
    return answers, samples, said, left


@pytest.mark.slow
def test_a_minute_of_video(builtin: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "minute.mp4", phases(FPS, SECONDS))
    answers, samples, said, left = watched(builtin, video)
    assert left == 130 and len(said) == 2 and said[1].endswith("interrupted; the watch is over")
    ages = [(one["frame"]["asked_age_ms"], one["frame"]["age_ms"]) for one in answers]
    inferences = [age - asked for asked, age in ages]
    for (asked, _), inference in zip(ages[1:], inferences, strict=False):
        assert asked <= inference + 1e3 / FPS  # never older than the inference before, and a frame
    numbers = [one["frame"]["number"] for one in answers]
    gaps = [later - earlier - 1 for earlier, later in pairwise(numbers)]
    assert gaps == [one["dropped"] for one in answers[1:]]
    assert grown(samples) == []
    print(said[0])
    print(
        f"asked p50 {statistics.median(asked for asked, _ in ages):.1f} ms, at most {max(ages)[0]:.1f} ms; "
        f"answered p50 {statistics.median(age for _, age in ages):.0f} ms; resident "
        f"{samples[5].resident:.1f} MB after 6 s, {samples[-1].resident:.1f} MB at the end; "
        f"{samples[-1].threads} threads, {samples[-1].descriptors} descriptors; {json.dumps(answers[-1])}"
    )
