"""The last line of a watch, and what is said on the way: names of files, answers that mean little."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vtp.runtime.bundle.stream_info import StreamInfo
from vtp.runtime.result import Timings
from vtp.serve.streams.answer import FrameAnswer
from vtp.serve.streams.cli import main
from vtp.serve.streams.frames import Frame
from vtp.serve.streams.sinks.tally import Tally

from .moving import scene

WHOLE, PART = {"rows": 17, "of": 17}, {"rows": 4, "of": 17, "cosine": 0.9}


def answer(tower: dict[str, float], reused: list[str] | None = None) -> FrameAnswer:
    result: Any = SimpleNamespace(timings=Timings(tower=tower, reused_stages=reused or []))
    return FrameAnswer(Frame(None, 0, 0, 0.0), "what ?", result, 0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("answers", "pictures", "said"),
    [
        ([answer(WHOLE)] * 3, 30, "0 recomputed in part (each was too unlike the one before: the tower asks"),
        ([answer(WHOLE)] * 3, 1, "0 recomputed in part (the bundle was made with every=1, which computes"),
        ([answer(WHOLE), answer(PART), answer(WHOLE)], 30, "1 recomputed in part in "),
        ([answer(WHOLE)], 30, "0 recomputed in part in "),
        ([answer(WHOLE), answer(WHOLE, ["vision_encoder"])], 30, "0 recomputed in part in "),  # the same
    ],
)
def test_why_nothing_was_reused(answers: list[FrameAnswer], pictures: int, said: str) -> None:
    watcher: Any = SimpleNamespace(seen=len(answers), asked=len(answers), skipped=0)
    tally = Tally(watcher, StreamInfo(4, 17, 0.8, pictures))
    for one in answers:
        tally.add(one)
    time.sleep(0.001)
    assert said in tally.line()


def test_files_are_named_and_alerts_that_mean_little_are_told_once(
    builtin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The built-in model never answers by a letter."""
    for name in ("a2.png", "a.png"):
        Image.fromarray(scene()).save(tmp_path / name)
    asked = [str(builtin), str(tmp_path), "--threads", "1", "--alert", "is there a star ?"]
    assert main(asked) == 0
    out, error = capsys.readouterr()
    assert [line.split("  ")[1] for line in out.splitlines()] == ["a.png", "a2.png"]
    assert error.count("the model gives its answers (yes, no) together a probability of ") == 1
    assert (
        main([*asked[:-2], "--alert", "what color is the star ? [blue|red|green]", "--labels", "texts"]) == 0
    )
    assert "together a probability" not in capsys.readouterr().err
