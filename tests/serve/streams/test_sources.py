"""What gives frames: video files, folders, network streams that die and come back; and what is refused."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtp.engines import VtpError
from vtp.serve.streams.frames import MEDIA, UNIX, Frame
from vtp.serve.streams.sources import video
from vtp.serve.streams.sources.folder import FolderSource
from vtp.serve.streams.sources.names import source_name
from vtp.serve.streams.sources.opening import check_source, open_source
from vtp.serve.streams.sources.pacing import Pace

av = pytest.importorskip("av", reason="PyAV (extra [streams]) is not installed")

from .mjpeg import Camera, camera  # noqa: E402
from .moving import decoded, moving, scene, write_video  # noqa: E402
from .rtsp import PASSWORD, rtsp_camera  # noqa: E402


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames at 10 a second."""
    return write_video(tmp_path_factory.mktemp("clip") / "moving.mp4", moving(20), fps=10)


def pixels(frame: Frame) -> np.ndarray:
    return np.asarray(frame.load())


# -- files ---------------------------------------------------------------------------------------------------


def test_every_frame_of_a_file_is_what_the_decoder_gives(clip: Path) -> None:
    frames, right = list(open_source(str(clip), every_frame=True)), decoded(clip)
    assert len(frames) == len(right) == 20
    for number, (frame, picture) in enumerate(zip(frames, right, strict=True)):
        assert (frame.number, frame.stamp_ns, frame.clock) == (number, number * 10**8, MEDIA)
        np.testing.assert_array_equal(pixels(frame), picture)


def test_frames_may_be_looked_at_long_after_the_file_was_closed(clip: Path) -> None:
    source = open_source(str(clip), every_frame=True)
    frames = [frame for frame in source if frame.number in (3, 12)]
    source.close()
    np.testing.assert_array_equal(pixels(frames[1]), decoded(clip)[12])


def test_a_file_is_played_in_its_own_time() -> None:
    """On a clock of the test's: a frame waits for its moment, a late one does not."""
    now, waits = [100.0], list[float]()

    class Closed(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(round(timeout or 0.0, 6))
            now[0] += timeout or 0.0
            return False

    pace = Pace(Closed(), lambda: now[0])
    assert pace.wait(5.0)  # the first is at once, whatever its stamp
    assert pace.wait(5.1)
    now[0] += 0.25  # the reader was slow
    assert pace.wait(5.2) and pace.wait(5.3) and pace.wait(5.4)
    assert waits == [0.0, 0.1, 0.0, 0.0, 0.05]
    assert pace.wait(1e300) and waits[-1] <= threading.TIMEOUT_MAX  # of a stamp that cannot be


def test_in_real_time_no_frame_comes_before_its_moment(clip: Path) -> None:
    began = time.monotonic()
    arrived = [(frame.arrived, frame.stamp) for frame in open_source(str(clip))]
    assert len(arrived) == 20
    assert all(when - began >= stamp - 1e-3 for when, stamp in arrived)


def test_closing_ends_a_file_that_plays(clip: Path) -> None:
    source = open_source(str(clip))
    frames: list[Frame] = []
    for frame in source:
        frames.append(frame)
        source.close()
    assert len(frames) == 1


def test_a_video_that_lies_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    """Phones write how the picture is to be turned; a viewer shows it so, and so does the model see it."""
    tall = tmp_path / "plain.mp4"
    write_video(tall, [scene()[:, :160]] * 2)
    turned = tmp_path / "turned.mp4"
    _with_rotation(tall, turned)
    plain, seen = decoded(tall)[0], pixels(next(iter(open_source(str(turned)))))
    assert seen.shape == (160, 336, 3)
    np.testing.assert_array_equal(seen, np.rot90(plain))


def _with_rotation(source: Path, target: Path) -> None:
    """Write a quarter turn into the track header's matrix, as phones do."""
    data = bytearray(source.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # version 0: the matrix stands 40 bytes behind the version
    one, zero, minus = (number.to_bytes(4, "big", signed=True) for number in (1 << 16, 0, -(1 << 16)))
    assert data[place : place + 4] == one
    data[place : place + 20] = zero + minus + zero + one + zero
    target.write_bytes(data)


def test_a_title_in_another_encoding_is_no_hindrance(tmp_path: Path) -> None:
    path = tmp_path / "title.mkv"
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "Tuer und Fenster"
        stream = out.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(scene()[:48, :64].copy(), format="rgb24")))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    assert b"Tuer" in data
    path.write_bytes(data.replace(b"Tuer", b"T\xfcr "))
    assert len(list(open_source(str(path), every_frame=True))) == 1


@pytest.mark.parametrize(
    ("codec", "layout"),
    [
        ("ffv1", "yuv420p"),
        ("ffv1", "yuv422p10le"),
        ("ffv1", "gray16le"),
        ("ffv1", "gbrp10le"),
        ("ffv1", "bgra"),
    ],
)
def test_odd_sizes_and_other_layouts_of_pixels(tmp_path: Path, codec: str, layout: str) -> None:
    """335 x 201 pixels in layouts that halve their colour, have ten or sixteen bits, no colour, or alpha."""
    path, shown = tmp_path / "odd.mkv", scene()[:201, :335]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=5)
        stream.width, stream.height, stream.pix_fmt = 335, 201, layout
        frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    (seen,) = (pixels(frame) for frame in open_source(str(path), every_frame=True))
    assert seen.shape == (201, 335, 3)
    grey = np.asarray(Image.fromarray(shown).convert("L").convert("RGB"))
    right = grey if layout.startswith("gray") else shown
    assert np.abs(seen.astype(int) - right).mean() < 6


# -- folders -------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_pictures_by_number(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        Image.fromarray(scene()[:, : 100 + number]).save(tmp_path / f"frame{number}.png")
    Image.fromarray(scene()[:, :100]).save(tmp_path / "frame.png")
    (tmp_path / "notes.txt").write_text("no picture")
    first, *frames = open_source(str(tmp_path))
    assert first.name == "frame.png"  # as it stands before frame1 in a list
    assert [frame.name for frame in frames] == ["frame1.png", "frame2.png", "frame10.png"]
    assert [frame.load().width for frame in frames] == [101, 102, 110]
    assert [frame.number for frame in frames] == [1, 2, 3] and {frame.clock for frame in frames} == {UNIX}
    assert FolderSource(tmp_path).every_frame and not FolderSource(tmp_path, fps=5).every_frame
    assert frames[0].stamp_ns == (tmp_path / "frame1.png").stat().st_mtime_ns


def test_a_folder_may_be_played(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (30, 30)).save(tmp_path / f"{number}.png")
    began = time.monotonic()
    arrived = [frame.arrived for frame in FolderSource(tmp_path, fps=20)]
    assert all(when - began >= place / 20 - 1e-3 for place, when in enumerate(arrived))


# -- streams -------------------------------------------------------------------------------------------------


@pytest.fixture
def live() -> Iterator[Camera]:
    with camera(lambda number: np.roll(scene(), 3 * number, axis=1)) as one:
        yield one


def test_a_stream_that_dies_and_comes_back_goes_on(live: Camera) -> None:
    told: list[str] = []
    frames: list[Frame] = []
    source = open_source(live.url, tell=told.append)
    for frame in source:
        frames.append(frame)
        if len(frames) == 3:
            live.down()
            threading.Timer(0.3, live.up).start()
        if len(told) == 2:  # lost, and back
            source.close()
    name = f"http://127.0.0.1:{live.port}/live.mjpg"
    assert source.name == name
    assert told[0].startswith(f"lost {name}: ") and told[1].startswith(f"{name} is back after ")
    assert not [line for line in told if "secret" in line]
    assert [frame.number for frame in frames] == list(range(len(frames)))
    assert {frame.clock for frame in frames} == {UNIX}
    assert frames[-1].load().size == (336, 336)


def test_a_stream_that_ends_at_once_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes connections and gives nothing makes one line, and longer and longer pauses."""
    monkeypatch.setattr(video, "_FIRST_DELAY", 0.01)
    told: list[str] = []
    with camera(lambda number: scene()) as one:
        source = video.VideoSource(video.Address.of(one.url), tell=told.append)
        for number, _ in enumerate(source):
            if number == 2:
                one.empty.set()
                one.cut()
                threading.Timer(1.0, one.empty.clear).start()
            if len(told) == 2:
                source.close()
        assert one.connections >= 5
    assert told[0].startswith("lost ") and "is back after" in told[1]


def test_a_stream_that_falls_silent_is_lost(live: Camera, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_READ", 0.5)
    told: list[str] = []
    source = open_source(live.url, tell=told.append)
    for number, _ in enumerate(source):
        if number == 2:
            live.silent.set()
            threading.Timer(2.0, live.silent.clear).start()
        if len(told) > 1:
            source.close()
    assert "nothing came for 0.5 s" in told[0] and "is back" in told[1]


def test_closing_ends_a_stream_that_cannot_be_reached(live: Camera) -> None:
    source = open_source(live.url)
    frames: list[Frame] = []
    for frame in source:
        frames.append(frame)
        if len(frames) == 2:
            live.down()
            threading.Timer(0.3, source.close).start()
    assert len(frames) >= 2


def test_a_camera_that_speaks_rtsp() -> None:
    """Behind a password; cut off, and back."""
    told: list[str] = []
    frames: list[Frame] = []
    with rtsp_camera(lambda number: np.roll(scene(), 6 * number, axis=1)) as cam:
        source = open_source(cam.url, tell=told.append)
        for frame in source:
            frames.append(frame)
            if len(frames) == 4:
                cam.down()
                threading.Timer(0.3, cam.up).start()
            if len(told) == 2:
                source.close()
        assert cam.requests.count("PLAY") == 2
        wrong = cam.url.replace(PASSWORD, "secret")
        assert refusal(wrong).startswith(f"cannot open rtsp://127.0.0.1:{cam.port}/live: Server returned 401")
    assert [line.partition(f"rtsp://127.0.0.1:{cam.port}/live")[0] for line in told] == ["lost ", ""]
    assert not [line for line in told if PASSWORD in line]
    moved = [np.roll(scene(), 6 * number, axis=1).astype(int) for number in range(56)]
    for frame in frames[:4]:
        assert min(np.abs(pixels(frame) - one).mean() for one in moved) < 4  # one of those that were sent


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtsp://user:pass@cam:554/h264", "rtsp://cam:554/h264"),
        ("rtsp://user:p@ss@cam/h264", "rtsp://cam/h264"),
        ("rtsp://cam/stream?user=a&password=b#c", "rtsp://cam/stream"),
        ("rtsp://cam:554/user=admin_password=tlJw_channel=1.sdp?real", "rtsp://cam:554/…"),
        ("http://cam/a/password=x/b", "http://cam/a/…"),
        ("http://cam/plain/path.mjpg", "http://cam/plain/path.mjpg"),
        ("/videos/a@b=c?.mp4", "/videos/a@b=c?.mp4"),
        ("rtsp://user:pa/ss@cam/h264", "rtsp://…@cam/h264"),
        ("http://user:pa?s/s@cam/h264?key=b", "http://…@cam/h264"),
        ("rtsp:/user:pass@cam/h264", "rtsp:/…@cam/h264"),
        ("rtsp:user:pass@cam/h264", "rtsp:…@cam/h264"),
    ],
)
def test_names_hold_no_secrets(text: str, name: str) -> None:
    assert source_name(text) == name


# -- bad input -----------------------------------------------------------------------------------------------


def refusal(text: str, **more: float) -> str:
    """The one line that refuses a source."""
    with pytest.raises(VtpError) as caught:
        open_source(text, **more)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert caught.value.__cause__ is None and (
        caught.value.__suppress_context__ or not caught.value.__context__
    )
    return str(caught.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert refusal("/dev/video99").startswith("no such camera: /dev/video99; ")
    assert refusal(str(tmp_path / "absent.mp4")).startswith("no such file or folder: ")
    assert "holds no pictures" in refusal(str(tmp_path))
    assert "Connection refused" in refusal("rtsp://user:secret@127.0.0.1:9/x?password=secret")
    assert "Connection refused" in refusal("http://user:secret@127.0.0.1:9/x")


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(4096))
    assert refusal(str(noise)).startswith(f"cannot open {noise}: Invalid data found")
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        out.mux(stream.encode(silence))
    assert "has no pictures, only sound or data" in refusal(str(sound))


def test_a_device_that_is_no_camera_is_refused() -> None:
    """FFmpeg's v4l2 asks it, as the nodes of a camera that give data and no pictures."""
    line = refusal("/dev/null")
    assert line.startswith(
        "cannot open /dev/null: Inappropriate ioctl for device; it is not a camera that gives"
    )
    assert "try the others" in line


@pytest.mark.parametrize(
    ("number", "cure"), [(errno.EACCES, "usermod -aG video"), (errno.EBUSY, "another program has it")]
)
def test_a_camera_that_cannot_be_had_is_refused(
    monkeypatch: pytest.MonkeyPatch, number: int, cure: str
) -> None:
    def refuse(*given: object, **named: object) -> None:
        av.error.err_check(-number, "/dev/null")

    monkeypatch.setattr(av, "open", refuse)
    assert refusal("/dev/null").startswith(f"cannot open /dev/null: {os.strerror(number)}; ")
    assert cure in refusal("/dev/null")


def test_an_encoding_without_a_decoder_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "unknown.mkv", moving(3))
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"))
    assert "an encoding that this FFmpeg has no decoder for" in refusal(str(path))


def test_a_file_that_names_others_opens_none_of_them(tmp_path: Path) -> None:
    """A playlist made by a stranger must not make FFmpeg fetch what it names."""
    with camera(lambda number: scene()) as one:
        listed = tmp_path / "list.m3u8"
        listed.write_text(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{one.url}\n#EXT-X-ENDLIST\n", encoding="utf-8"
        )
        refusal(str(listed))
        assert one.sent == 0


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.mp4"
    os.mkfifo(fifo)
    assert "fifo.mp4 is not a regular file; give a video" in refusal(str(fifo))


def test_a_live_stream_waits_for_nobody(live: Camera) -> None:
    with pytest.raises(VtpError, match="--every-frame is for recordings, and http://127"):
        open_source(live.url, every_frame=True)
    with pytest.raises(VtpError, match="--every-frame is for recordings, and zenoh:/image is live"):
        open_source("zenoh:/image", every_frame=True)


def test_other_kinds_are_refused(tmp_path: Path, clip: Path) -> None:
    assert "URLs may begin with rtsp://" in refusal("ftp://user:secret@host/x")
    assert "vtp-ros2" in refusal("ros2:/camera/image")
    assert "topic '9a' is not a name of ROS" in refusal("zenoh:9a")
    assert "'robot:7447' is not an address of zenoh" in refusal("zenoh:robot:7447#/camera/image")
    assert "--fps is for a folder" in refusal(str(clip), fps=2)
    check_source(str(clip))


def test_frames_larger_than_any_picture_are_refused(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_PIXELS", 336 * 336 - 1)
    assert "has frames of 336x336 = 112,896 pixels" in refusal(str(clip))


def test_a_file_that_is_cut_off_gives_what_it_has(clip: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.ts"
    write_video(tmp_path / "whole.ts", moving(20), fps=10)
    data = (tmp_path / "whole.ts").read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    frames = list(open_source(str(cut), every_frame=True))
    assert 1 <= len(frames) < 20
