"""What strangers and odd cameras give: playlists, lies about sizes, mirrored and transparent pictures."""

from __future__ import annotations

import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtp.engines import VtpError
from vtp.serve.streams.sources import video
from vtp.serve.streams.sources.opening import open_source

av = pytest.importorskip("av", reason="PyAV (extra [streams]) is not installed")

from .moving import decoded, moving, scene, write_video  # noqa: E402


def refusal(text: str) -> str:
    """The one line that ends a source, at its opening or later."""
    with pytest.raises(VtpError) as caught:
        list(open_source(text, every_frame=True))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextmanager
def server(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A TCP server that does `talk` with who connects; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    one, _ = listener.accept()
                    with one:
                        talk(one)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


# -- what names other files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n"),
        ("video.mp4", "ffconcat version 1.0\nfile other.ts\n"),
        ("list.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:other.ts\n#EXT-X-ENDLIST\n"),
    ],
)
def test_a_playlist_opens_no_other_file(tmp_path: Path, name: str, text: str) -> None:
    write_video(tmp_path / "other.ts", moving(3))
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert "cannot open" in refusal(str(tmp_path / name))


def test_a_name_with_a_pattern_opens_no_other_file(tmp_path: Path) -> None:
    for name in ("frame%d.png", "frame0.png", "frame1.png"):
        Image.fromarray(scene()).save(tmp_path / name)
    assert "it is a playlist" in refusal(str(tmp_path / "frame%d.png"))
    assert len(list(open_source(str(tmp_path / "frame1.png")))) == 1


def test_a_stream_cannot_name_files_of_this_machine(tmp_path: Path) -> None:
    """A playlist that comes over a bare connection; FFmpeg by itself would read the file that it names."""
    write_video(tmp_path / "private.ts", moving(3))
    listed = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:{tmp_path}/private.ts\n#EXT-X-ENDLIST\n"
    with server(lambda one: one.sendall(listed.encode())) as port:
        address = f"tcp://127.0.0.1:{port}/list.m3u8"
        with pytest.raises(VtpError, match="cannot open tcp://127"):
            open_source(address)


# -- files without a picture ---------------------------------------------------------------------------------


def test_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 16384, 16384, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert "gave no picture: 1 packets could not be decoded" in refusal(str(path))


def test_a_video_without_a_frame_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.mp4"
    with av.open(str(path), "w", options={"movflags": "empty_moov+frag_keyframe"}) as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    assert "gave no picture: it is empty" in refusal(str(path))


def test_the_cover_of_a_song_is_no_video(tmp_path: Path) -> None:
    path, cover = tmp_path / "song.flac", av.VideoFrame.from_ndarray(scene().copy(), format="rgb24")
    with av.open(str(path), "w") as out:
        sound, picture = out.add_stream("flac", rate=8000, layout="mono"), out.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 336, 336, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        packets = [*picture.encode(cover), *picture.encode(None), *sound.encode(silence), *sound.encode(None)]
        out.mux(packets)
    with av.open(str(path)) as file:
        assert len(file.streams.video) == 1
    assert "has no pictures, only sound or data" in refusal(str(path))


def test_packets_that_cannot_be_decoded_are_counted(tmp_path: Path) -> None:
    path, told = tmp_path / "hurt.avi", list[str]()
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 336, 336, "yuvj420p"
        for picture in moving(4):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    second = data.index(b"00dc", data.index(b"00dc") + 4)
    (size,) = struct.unpack_from("<I", data, second + 4)
    data[second + 8 : second + 8 + size] = bytes(size)
    path.write_bytes(data)
    assert len(list(open_source(str(path), True, tell=told.append))) == 3
    assert told == [f"1 packets of {path} could not be decoded and were left out"]


def test_a_long_wait_between_two_frames_is_told(tmp_path: Path) -> None:
    path, told = tmp_path / "hourly.mp4", list[str]()
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=1, options={"tune": "zerolatency"})
        stream.width, stream.height, stream.pix_fmt = 336, 336, "yuv420p"
        for number, picture in enumerate(moving(2)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = 3600 * number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    source = open_source(str(path), tell=lambda line: (told.append(line), source.close())[0])
    assert len(list(source)) == 1
    assert told and told[0].startswith(f"the next frame of {path} is 3600 s after the one before")


# -- what is shown -------------------------------------------------------------------------------------------


def test_transparent_parts_are_white_as_in_pictures(tmp_path: Path) -> None:
    path, pixels = tmp_path / "clear.mkv", np.dstack([scene(), np.full((336, 336), 255, np.uint8)])
    pixels[:100, :100, 3] = 0
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 336, 336, "bgra"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        out.mux(stream.encode(None))
    seen = np.asarray(next(iter(open_source(str(path)))).load())
    right = scene().copy()
    right[:100, :100] = 255
    np.testing.assert_array_equal(seen, right)


@pytest.mark.parametrize(
    ("matrix", "right"),
    [
        ((-1, 0, 0, 1), lambda plain: plain[:, ::-1]),
        ((1, 0, 0, -1), lambda plain: plain[::-1]),
        ((-1, 0, 0, -1), lambda plain: plain[::-1, ::-1]),
        ((0, 1, 1, 0), lambda plain: plain.transpose(1, 0, 2)),
        ((0, 1, -1, 0), lambda plain: np.rot90(plain, -1)),
    ],
)
def test_mirrored_and_turned_videos_are_shown_upright(
    tmp_path: Path, matrix: tuple[int, ...], right: Callable[[np.ndarray], np.ndarray]
) -> None:
    """A front camera writes the mirror into the track header's matrix (ISO/IEC 14496-12, 8.3.2)."""
    path = write_video(tmp_path / "plain.mp4", [scene()[:, :160]] * 2)
    plain, data = decoded(path)[0], bytearray(path.read_bytes())
    a, b, c, d = (number << 16 for number in matrix)
    struct.pack_into(">5i", data, data.index(b"tkhd") + 44, a, b, 0, c, d)
    path.write_bytes(data)
    seen = np.asarray(next(iter(open_source(str(path)))).load())
    np.testing.assert_array_equal(seen, right(plain))


def test_closing_what_was_never_read_closes_the_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "unread.mp4", moving(2))
    source = open_source(str(path))
    assert path in _open_files()
    source.close()
    assert path not in _open_files() and list(source) == []


def _open_files() -> list[Path]:
    folder = Path("/proc/self/fd")
    return [one.readlink() for one in folder.iterdir() if one.is_symlink()]


# -- servers -------------------------------------------------------------------------------------------------


def test_an_opening_that_hangs_is_left_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a silent server can be interrupted; what opens late is closed again."""
    came, left = threading.Event(), threading.Event()

    class Slow(video.Opened):
        def __init__(self, address: video.Address) -> None:
            came.wait(10)

        def close(self) -> None:
            left.set()

    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "Opened", Slow)
    monkeypatch.setattr(video.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_source("http://127.0.0.1:9/")
    monkeypatch.undo()
    came.set()
    assert left.wait(10)
