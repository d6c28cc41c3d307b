"""Frames that cannot be asked about: a camera goes on, and a line tells of many."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.runtime.preprocess import pixels as preprocessing
from vtp.serve.streams.answer import FrameAnswer
from vtp.serve.streams.frames import Frame
from vtp.serve.streams.left_out import LeftOut
from vtp.serve.streams.newest import PushedFrames
from vtp.serve.streams.sinks.kept import KeptPictures
from vtp.serve.streams.sources.opening import open_source
from vtp.serve.streams.watcher import Watcher

PROMPT = "what is it ?"


def picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Given:
    """A source of what is there already, all of which is wanted."""

    name, every_frame = "given", True

    def __init__(self, *given: object) -> None:
        self.given = given

    def __iter__(self) -> Iterator[Any]:
        return iter(self.given)

    def close(self) -> None:
        """Nothing is open."""


def frames(*pictures: Any) -> Given:
    return Given(*[Frame(one, number, 0, time.monotonic()) for number, one in enumerate(pictures)])


def test_a_picture_that_the_model_cannot_take_is_left_out_and_the_next_is_asked_about(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too long and thin: resized so that its shorter edge fits, it would have too many pixels."""
    monkeypatch.setattr(preprocessing, "MAX_PIXELS", 100_000)
    told: list[str] = []
    source = frames(picture(0), picture(1, 3000, 2), picture(2))
    watcher = Watcher(pipe, source, PROMPT, tell=told.append, every=0.01, max_new_tokens=1)
    assert [(one.frame.number, one.dropped) for one in watcher] == [(0, 0), (2, 1)]
    (line,) = told
    assert line.startswith("frame 1 is left out: a picture of 3000x2 is too long")


def test_the_same_reason_is_told_once_in_ten_seconds_and_counted() -> None:
    told: list[str] = []
    now = [100.0]
    left_out = LeftOut(told.append, lambda: now[0])
    frame = Frame(b"", 7, 0, 0.0)
    for moment in (100.0, 101.0, 109.9, 110.0, 111.0):
        now[0] = moment
        left_out.add(frame, VtpError("images of encoding 'x' are not served"))
    left_out.add(frame, VtpError("a message is cut off"))
    left_out.add(frame, VtpError("a message is cut off"))
    left_out.end()
    left_out.end()
    one = "frame 7 is left out: images of encoding 'x' are not served"
    assert told == [
        one,
        f"{one} (3 since the last line)",
        "frame 7 is left out: a message is cut off (2 since the last line)",
        "1 more frames were left out",
    ]
    assert left_out.reason == "a message is cut off"


def test_a_source_of_which_nothing_could_be_asked_about_is_an_error(pipe: Pipeline) -> None:
    told: list[str] = []
    watcher = Watcher(pipe, frames(b"no picture", b"no picture"), PROMPT, tell=told.append)
    with pytest.raises(VtpError, match="no frame of given could be asked about; the last was left out: the"):
        next(watcher)
    assert len(told) == 2 and told[1] == "1 more frames were left out"
    assert list(watcher) == []


def test_a_stop_is_no_error_whatever_was_left_out(pipe: Pipeline) -> None:
    pushed = PushedFrames("pushed")
    watcher = Watcher(pipe, pushed, PROMPT, tell=lambda line: watcher.stop())
    pushed.put(Frame(b"no picture", 0, 0, time.monotonic()))
    assert list(watcher) == []


# -- what changes while it is read ---------------------------------------------------------------------------


def test_what_is_shown_is_what_was_asked_about(pipe: Pipeline, tmp_path: Path) -> None:
    """A file of a folder that was overwritten, or has gone, after it was asked about."""
    folder, kept = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
    sink, shown = KeptPictures(kept, pipe.manifest), list[np.ndarray]()
    answers: list[FrameAnswer] = []
    for answer in Watcher(pipe, open_source(str(folder)), PROMPT, max_new_tokens=1):
        if answer.frame.number:
            (folder / answer.frame.name).unlink()
        else:
            Image.fromarray(picture(99)).save(folder / "0.png")
        sink(answer)
        shown.append(np.asarray(answer.picture()))
        answers.append(answer)
    assert len(list(kept.iterdir())) == 3
    for number, one in enumerate(shown):
        np.testing.assert_array_equal(one, picture(number))
    gc.collect()
    np.testing.assert_array_equal(np.asarray(answers[0].picture()), picture(99))  # loaded again
    with pytest.raises(VtpError, match="no such file"):
        answers[1].picture()


def test_a_file_that_cannot_be_looked_at_is_left_out(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    source, look = open_source(str(tmp_path)), Path.stat

    def refused(path: Path, **more: Any) -> Any:
        if path.name == "0.png":
            raise PermissionError(13, "Permission denied")
        return look(path, **more)

    monkeypatch.setattr(Path, "stat", refused)
    assert [frame.name for frame in source] == ["0.png", "1.png"]


# -- what programs give by mistake ---------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["clip.mp4", Path("folder"), None, [1, 2]])
def test_what_is_no_source_is_refused_at_once(pipe: Pipeline, source: Any) -> None:
    with pytest.raises(UsageError, match=r"is not a source of frames; give open_source\(\.\.\.\)"):
        Watcher(pipe, source, PROMPT)


def test_other_mistakes_are_refused_in_one_line(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="'bundle' is not a Pipeline"):
        Watcher("bundle", frames(), PROMPT)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="alerts None is not a list"):
        Watcher(pipe, frames(), PROMPT, alerts=None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"given gave array.* which is not a Frame"):
        list(Watcher(pipe, Given(picture(0)), PROMPT))


@pytest.mark.parametrize("given", [0, None, b"/dev/video0", "", "  "])
def test_what_names_no_source_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="is not a source; give a video, a folder"):
        open_source(given)


def test_a_path_is_a_source(tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    assert [frame.name for frame in open_source(tmp_path)] == ["0.png"]


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), "3", True])
def test_a_rate_that_is_none_is_refused(tmp_path: Path, fps: Any) -> None:
    with pytest.raises(UsageError, match="is not a number above 0"):
        open_source(str(tmp_path), fps=fps)
