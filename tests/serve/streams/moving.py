"""Videos of the built-in model's example scenes, moving, written with a real encoder."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.scenes import examples_dir

av = pytest.importorskip("av", reason="PyAV (extra [streams]) is not installed")

EDGE = 336


@functools.cache
def scene(name: str = "scene.png") -> np.ndarray:
    """An example, uint8 [336,336,3]."""
    return np.asarray(Image.open(examples_dir() / name).convert("RGB").resize((EDGE, EDGE)))


def moving(frames: int, step: int = 2) -> Iterable[np.ndarray]:
    """The first example moving to the right, `step` pixels a frame."""
    return (np.roll(scene(), step * number, axis=1) for number in range(frames))


def phases(fps: int, seconds: int) -> Iterable[np.ndarray]:
    """A slow drift, a sudden cut, and stillness, a third of the time each."""
    third = fps * seconds // 3
    yield from (np.roll(scene(), number * 40 // third, axis=1) for number in range(third))
    yield from moving(third)
    yield from [scene("scene2.png")] * (fps * seconds - 2 * third)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int = 30, **more: Any) -> Path:
    """H.264 in what the suffix says; frames are uint8 [H,W,3]."""
    with av.open(str(path), "w", **more) as out:
        stream: Any = out.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "veryfast"})
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = frame.shape[:2]
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return path


def decoded(path: Path) -> list[np.ndarray]:
    """Every frame as FFmpeg decodes it, uint8 [H,W,3]."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
