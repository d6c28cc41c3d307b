"""Opening videos: which frames, from which kinds of source, and what is refused in one line."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers.video_utils import VideoMetadata, default_sample_indices_fn
from transformers.video_utils import convert_to_rgb as on_white

from vtp.engines import UsageError, VtpError
from vtp.runtime.media.videos import check_video, load_video, sample_frames
from vtp.runtime.preprocess import preprocess, spec_from_json
from vtp.runtime.preprocess.clip import ClipSpec

MP4 = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(64)


def film(frames: int, height: int = 13, width: int = 21) -> np.ndarray:
    """uint8 [frames, height, width, 3]: plain colours, each frame its own."""
    shades = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 16
    return np.broadcast_to(shades + np.array([0, 3, 6], np.uint8), (frames, height, width, 3)).copy()


def animated(frames: int, form: str) -> bytes:
    images = [Image.fromarray(frame) for frame in film(frames)]
    file, more = io.BytesIO(), {"lossless": True} if form == "WEBP" else {}
    images[0].save(file, form, save_all=True, append_images=images[1:], duration=40, **more)
    return file.getvalue()


def write_folder(folder: Path, frames: int) -> Path:
    folder.mkdir()
    for number, frame in enumerate(film(frames)):
        Image.fromarray(frame).save(folder / f"frame{number}.png")  # frame10 sorts before frame2 as text
    (folder / "notes.txt").write_text("no frame")
    (folder / ".hidden.png").write_bytes(b"no frame either")
    return folder


def shown(source: Any, frames: int) -> np.ndarray:
    return np.stack([np.asarray(image) for image in load_video(source, frames)])


@pytest.mark.parametrize("total", [8, 9, 15, 16, 17, 100, 299])
def test_frames_are_taken_as_transformers_takes_them(total: int) -> None:
    metadata = VideoMetadata(total_num_frames=total)
    assert sample_frames(total, 8) == default_sample_indices_fn(metadata, num_frames=8).tolist()


def test_every_kind_of_source_gives_the_same_frames(tmp_path: Path) -> None:
    expected = film(12)[[0, 3, 6, 9]]
    folder = write_folder(tmp_path / "frames", 12)
    moving = tmp_path / "moving.webp"
    moving.write_bytes(animated(12, "WEBP"))
    sources = [
        film(12),
        list(film(12)),
        [Image.fromarray(frame) for frame in film(12)],
        tuple(folder / f"frame{number}.png" for number in range(12)),
        folder,
        str(folder),
        moving,
        moving.read_bytes(),
        animated(12, "GIF"),
    ]
    for source in sources:
        np.testing.assert_array_equal(shown(source, 4), expected)
    with Image.open(moving) as image:
        np.testing.assert_array_equal(shown(image, 4), expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (film(3), r"the video has 3 frames, and this bundle answers about clips of 4; .* --frames 3$"),
        ([], r"the video has 0 frames"),
        (animated(3, "GIF"), r"the video given as \d+ bytes has 3 frames"),
        (film(1)[0], r"the array is a single picture, and this bundle answers about videos"),
        (Image.fromarray(film(1)[0]), r"the picture is a single picture"),
        (
            film(4).astype(np.float32),
            r"must be uint8 \[frames, height, width, 3\] in RGB, or 4 in RGBA, not float32",
        ),
        (film(4).transpose(0, 3, 1, 2), r"not uint8 \[4, 3, 13, 21\]"),
        (MP4, r"the video given as 88 bytes is a video file; give its path"),
        (7, r"a video may be a folder, a file, .*, not int"),
        ("nowhere", r"no such folder or file: 'nowhere'"),
    ],
)
def test_what_is_no_video_is_refused(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_video(source, 4)
    assert "\n" not in str(caught.value)


def test_transparent_frames_lie_on_white(tmp_path: Path) -> None:
    """As transformers lays the frames of a video, but for its not rounding them."""
    frames = np.random.default_rng(0).integers(0, 256, (9, 13, 21, 4), dtype=np.uint8)
    frames[..., 3] = frames[..., 3] // 64 * 85  # 0, a third, two thirds, 255
    expected = np.round(on_white(frames[[0, 3, 6]], "channels_last")).transpose(0, 2, 3, 1)
    assert np.abs(expected - frames[[0, 3, 6], ..., :3]).max() > 200
    images = [Image.fromarray(frame) for frame in frames]
    file, path = io.BytesIO(), tmp_path / "moving.png"
    for target in (file, path):
        images[0].save(target, "WEBP", save_all=True, append_images=images[1:], lossless=True, exact=True)
    for source in (frames, list(frames), images, file.getvalue(), path):
        np.testing.assert_array_equal(shown(source, 3), expected)


def test_a_gifs_transparent_pixels_are_white() -> None:
    """Frames of one colour on nothing; Pillow's own RGBA says what a viewer sees through."""
    images = []
    for number in range(4):
        image = Image.new("RGBA", (20, 20), (200, 30, 60, 0))
        image.paste((20, 40 * number, 90, 255), (0, 0, 10, 20))
        images.append(image)
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], disposal=2)
    for frame, image in zip(shown(file.getvalue(), 4), images, strict=True):
        np.testing.assert_array_equal(frame[:, 10:], 255)
        np.testing.assert_array_equal(frame[:, :10], np.asarray(image)[:, :10, :3])


def test_fifos_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clip.mp4")
    with pytest.raises(UsageError, match=r"clip.mp4' is not a regular file"):
        load_video(tmp_path / "clip.mp4", 4)
    os.mkfifo(tmp_path / "frame.png")
    with pytest.raises(UsageError, match=r"frame.png' is not a regular file"):
        load_video(tmp_path, 1)


@pytest.mark.parametrize(
    "source",
    [film(3), [], film(1)[0], film(4).astype(np.float32), [film(1)[0]] * 3 + ["gone.png"], 7, "nowhere"],
    ids=["few", "none", "picture", "float", "file", "number", "path"],
)
def test_checking_finds_what_shows_without_decoding(source: Any) -> None:
    with pytest.raises(UsageError) as wanted:
        load_video(source, 4)
    with pytest.raises(UsageError) as found:
        check_video(source, 4)
    assert str(found.value) == str(wanted.value)


def test_checking_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, moving = write_folder(tmp_path / "frames", 5), tmp_path / "moving.gif"
    moving.write_bytes(animated(5, "GIF"))
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(MP4)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for source in (film(4), list(film(4)), folder, moving, clip, moving.read_bytes(), Image.open(moving)):
        check_video(source, 4)
    (folder / "frame3.png").write_bytes(b"no picture")
    with pytest.raises(VtpError, match=r"frame3\.png' is not a picture"):
        check_video(folder, 5)


def test_folders_and_files_that_are_no_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no pictures \(\.bmp, "):
        load_video(tmp_path, 4)
    broken = tmp_path / "broken.gif"
    broken.write_bytes(animated(9, "GIF")[:60])
    with pytest.raises(VtpError, match=r"broken\.gif' is"):
        load_video(broken, 4)
    with pytest.raises(UsageError, match=r"frames' has 3 frames, and this bundle"):
        load_video(write_folder(tmp_path / "frames", 3), 4)


def test_a_video_file_without_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)  # importing it then fails
    path = tmp_path / "clip.mp4"
    path.write_bytes(MP4)
    with pytest.raises(VtpError, match=r"only OpenCV reads, and it is not installed: pip install opencv-"):
        load_video(path, 4)


def test_a_video_file_through_opencv(tmp_path: Path) -> None:
    """Every frame of the right place, within what the file's compression loses."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    path, frames = tmp_path / "clip.avi", film(12, 48, 64)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
    writer.release()
    found = shown(path, 4).astype(int)
    assert np.abs(found - frames[[0, 3, 6, 9]]).max() <= 4  # frames are 16 apart
    with pytest.raises(UsageError, match=r"clip\.avi' has 12 frames, and this bundle"):
        load_video(path, 13)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(VtpError, match="OpenCV finds no frames in"):
        load_video(path, 4)


def test_pixels_of_a_clip_are_those_of_its_pictures() -> None:
    spec = ClipSpec(height=8, width=8, frames=2)
    pictures = [Image.fromarray(frame) for frame in film(2)]
    one = ClipSpec(height=8, width=8)
    expected = np.concatenate([preprocess(picture, one) for picture in pictures])
    assert spec.shape == expected.shape == (2, 3, 8, 8)
    np.testing.assert_array_equal(preprocess(pictures, spec), expected)
    with pytest.raises(VtpError, match="answers about videos of 2 frames, not about a picture"):
        preprocess(pictures[0], spec)
    with pytest.raises(VtpError, match="of 2 frames, not about 1 frames"):
        preprocess(pictures[:1], spec)
    with pytest.raises(VtpError, match="answers about pictures, not videos"):
        preprocess(pictures, one)
    with pytest.raises(VtpError, match="kind qwen has no frames"):
        spec_from_json({"kind": "qwen", "frames": 2})
