"""docs/python.md and docs/examples/camera.py do what they say: run whole, on a tiny bundle."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.runtime import Pipeline

ROOT = Path(__file__).parents[1]
CAMERA = ROOT / "docs/examples/camera.py"


@pytest.fixture(scope="module")
def bundle(exported: Callable[[str], Any]) -> Path:
    return exported("vispruner").folder


def test_the_pages_python_runs_as_it_stands(bundle: Path, picture: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to(bundle)
    picture.save(tmp_path / "scene.png")
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    oblong = "ignore:24% of a picture of 120x90"  # which the picture of this test is
    command = [sys.executable, "-W", "error", "-W", oblong, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with Pipeline.load(bundle, threads=1) as pipe:
        colors = [f"what color is the {shape} ?" for shape in ("star", "ring", "cross")]
        wanted = [pipe.generate(picture, one, max_new_tokens=16) for one in [*colors, "where is the star ?"]]
    assert f"\n{[one.text for one in wanted[:3]]}\n{wanted[3].raw_text}" in done.stdout


@pytest.fixture(scope="module")
def camera() -> Any:
    spec = importlib.util.spec_from_file_location("camera", CAMERA)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_latest_frame_wins(camera: Any) -> None:
    """While frame 1 is asked about, frames 2 to 5 come: 5 is next, then what comes later."""
    go = {number: threading.Event() for number in (2, 6)}
    came = {number: threading.Event() for number in (5, 6)}
    count, asked = 0, []

    def read() -> tuple[bool, Any]:
        nonlocal count
        if count in came:
            came[count].set()  # the one before was kept: this is called for the next
        count += 1
        if count in go:
            assert go[count].wait(30)
        return (True, f"frame {count}") if count <= 6 else (False, None)

    def generate(frame: str, question: str, **options: Any) -> str:
        assert (question, options["color"]) == ("what ?", "bgr")
        asked.append(frame)
        number = {"frame 1": 5, "frame 5": 6}.get(frame)
        if number is not None:
            go[{5: 2, 6: 6}[number]].set()
            assert came[number].wait(30)
        return frame.upper()

    found = list(camera.answers(SimpleNamespace(generate=generate), read, "what ?"))
    assert asked == ["frame 1", "frame 5", "frame 6"]
    assert found == [(1, "FRAME 1"), (5, "FRAME 5"), (6, "FRAME 6")]


def test_a_camera_that_is_pulled_out_ends_the_loop(camera: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's thread shows its error, and nobody waits for its next frame."""
    frames, shown, found = iter(["frame 1"]), list[Any](), list[Any]()
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_type))
    pipe = SimpleNamespace(generate=lambda frame, question, **options: frame)
    loop = threading.Thread(
        target=lambda: found.extend(camera.answers(pipe, lambda: (True, next(frames)), "what ?")), daemon=True
    )
    loop.start()
    loop.join(30)
    assert not loop.is_alive()
    assert (found, shown) == ([(1, "frame 1")], [StopIteration])


def test_a_camera_that_does_not_open_is_said(camera: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = SimpleNamespace(isOpened=lambda: False, read=lambda: (False, None))
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=lambda _: capture))
    with pytest.raises(SystemExit, match="camera 9 cannot be opened"):
        camera.main("nowhere", "9")


def test_the_whole_program_answers_about_bgr_frames(
    camera: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = list(np.random.default_rng(3).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8))
    with Pipeline.load(bundle, threads=1) as pipe:
        wanted = {
            number: pipe.generate(np.ascontiguousarray(one[:, :, ::-1]), "what is ahead ?", max_new_tokens=16)
            for number, one in enumerate(frames, 1)
        }
    left = [*((True, frame) for frame in frames), (False, None)]
    capture = SimpleNamespace(read=lambda: left.pop(0), isOpened=lambda: True)
    opened: list[Any] = []
    stand_in = SimpleNamespace(VideoCapture=lambda which: opened.append(which) or capture)
    monkeypatch.setitem(sys.modules, "cv2", stand_in)
    camera.main(str(bundle), "0")
    lines = re.findall(r"frame (\d), \d+ ms: (.*)\n", capsys.readouterr().out)
    assert opened == [0] and lines and lines[-1][0] == "3"
    assert all(wanted[int(number)].text == text for number, text in lines)
