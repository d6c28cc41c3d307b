"""--show-kept as a video: what FFmpeg decodes of it, how it ends, and what it refuses."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import VtpError
from vtp.runtime import Pipeline
from vtp.runtime.media.show_kept import show_kept
from vtp.serve.streams import cli
from vtp.serve.streams.answer import FrameAnswer
from vtp.serve.streams.sinks import kept
from vtp.serve.streams.sinks.kept import KeptVideo
from vtp.serve.streams.sources.folder import FolderSource
from vtp.serve.streams.watcher import Watcher

from .mjpeg import camera
from .moving import av, decoded, moving, scene, write_video

ASKED = ("--prompt", "what is it ?", "--max-new-tokens", "1", "--threads", "1")
NEAR = 4.0  # mean difference of 255 that H.264 makes of these pictures; of other ones it is above 20


@pytest.fixture(scope="module")
def tiny(exported: Callable[[str], Any]) -> Path:
    return exported("vispruner").folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, int, str]:
    """Exit code, how many answers there were, standard error."""
    code = cli.main([*map(str, arguments), *ASKED])
    out, error = capsys.readouterr()
    return code, len(out.splitlines()), error


def times(path: Path) -> list[float]:
    with av.open(str(path)) as file:
        return [round(frame.time, 3) for frame in file.decode(video=0)]


def answers(pipe: Pipeline, folder: Path) -> list[FrameAnswer]:
    with Watcher(pipe, FolderSource(folder), "what ?", max_new_tokens=1, keep_tokens=3) as watcher:
        return list(watcher)


def pictures(folder: Path, *sizes: tuple[int, int]) -> Path:
    """Files of smooth pictures [width, height], each of other colours."""
    folder.mkdir()
    for number, size in enumerate(sizes):
        colours = np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def drawn(pipe: Pipeline, answer: FrameAnswer) -> np.ndarray:
    """The picture that vtp-run --show-kept would write."""
    rows, columns = pipe.manifest.visual.grid
    return np.asarray(show_kept(answer.frame.load(), pipe.manifest.image, (rows, columns), answer.kept))


def far(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


def test_every_frame_asked_about_is_in_the_video(
    tiny: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file, at the frames' own times."""
    clip = write_video(tmp_path / "clip.mp4", moving(6, 30), fps=5)
    code, count, error = run(capsys, tiny, clip, "--every-frame", "--show-kept", tmp_path / "kept.mp4")
    shown = decoded(tmp_path / "kept.mp4")
    assert (code, count, len(shown)) == (0, 6, 6), error
    assert times(tmp_path / "kept.mp4") == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    grid = (pipe.manifest.visual.grid[0], pipe.manifest.visual.grid[1])
    wanted = []
    for frame in decoded(clip):
        chosen = pipe.generate(frame, "what is it ?", max_new_tokens=1).kept
        wanted.append(np.asarray(show_kept(Image.fromarray(frame), pipe.manifest.image, grid, chosen)))
    assert max(far(*pair) for pair in zip(shown, wanted, strict=True)) < NEAR
    assert far(shown[0], wanted[3]) > 2 * NEAR


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_odd_sizes_and_frames_of_other_sizes(pipe: Pipeline, tmp_path: Path, suffix: str) -> None:
    """The first frame's size, made even; others in its middle, as large as they can be."""
    given = answers(pipe, pictures(tmp_path / "in", (101, 75), (202, 150), (75, 150), (1, 1)))
    with KeptVideo(tmp_path / f"kept{suffix}", pipe.manifest) as video:
        for answer in given:
            video(answer)
    shown = decoded(tmp_path / f"kept{suffix}")
    assert [one.shape for one in shown] == [(76, 102, 3)] * 4
    assert far(shown[0][:75, :101], drawn(pipe, given[0])) < NEAR
    half = np.asarray(Image.fromarray(drawn(pipe, given[1])).resize((101, 75), Image.Resampling.BOX))
    assert far(shown[1][:75, :101], half) < NEAR
    tall = np.asarray(Image.fromarray(drawn(pipe, given[2])).resize((38, 76), Image.Resampling.BOX))
    assert far(shown[2][:, 32:70], tall) < 2 * NEAR  # its edges are sharp against the black beside it
    assert shown[2][:, :28].max() < 40 and shown[2][:, 74:].max() < 40


def test_large_pictures_are_made_smaller(pipe: Pipeline, tmp_path: Path) -> None:
    (given,) = answers(pipe, pictures(tmp_path / "in", (3001, 31)))
    with KeptVideo(tmp_path / "kept.mkv", pipe.manifest) as video:
        video(given)
    assert [one.shape for one in decoded(tmp_path / "kept.mkv")] == [(20, 1920, 3)]


def test_the_time_between_frames_is_the_streams_but_for_long_waits(pipe: Pipeline, tmp_path: Path) -> None:
    """Stamps in milliseconds: usual, twice the same, an hour later, and back in time."""
    (given,) = answers(pipe, pictures(tmp_path / "in", (64, 48)))
    with KeptVideo(tmp_path / "kept.mkv", pipe.manifest) as video:
        for stamp in (100, 140, 140, 3_600_140, 50):
            frame = replace(given.frame, stamp_ns=stamp * 10**6, clock="media")
            video(replace(given, frame=frame))
    assert times(tmp_path / "kept.mkv") == [0.0, 0.04, 0.05, 5.05, 5.06]
    with KeptVideo(tmp_path / "live.mkv", pipe.manifest) as video:
        for arrived in (7.0, 7.5, 7.75):  # as it is taken
            video(replace(given, frame=replace(given.frame, arrived=arrived)))
    assert times(tmp_path / "live.mkv") == [0.0, 0.5, 0.75]


def test_pictures_of_a_folder_are_shown_for_a_second_each(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pictures(tmp_path / "in", (64, 48), (64, 48), (64, 48))
    run(capsys, tiny, source, "--show-kept", tmp_path / "kept.mp4")
    assert times(tmp_path / "kept.mp4") == [0.0, 1.0, 2.0]


def test_without_an_answer_there_is_no_file(pipe: Pipeline, tmp_path: Path) -> None:
    with KeptVideo(tmp_path / "kept.mp4", pipe.manifest):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_an_mkv_that_was_not_ended_little_is_lost(pipe: Pipeline, tmp_path: Path) -> None:
    """As when the process is killed; a small picture at that, of which a buffer would hold hundreds."""
    (given,) = answers(pipe, pictures(tmp_path / "in", (16, 16)))
    video = KeptVideo(tmp_path / "kept.mkv", pipe.manifest)
    for stamp in range(0, 5000, 500):
        video(replace(given, frame=replace(given.frame, stamp_ns=stamp * 10**6, clock="media")))
    assert times(tmp_path / "kept.mkv")[-1] >= 3.0
    video.close()
    assert times(tmp_path / "kept.mkv")[-1] == 4.5


# -- how it ends ---------------------------------------------------------------------------------------------


_COMMAND = """
import resource, signal, sys
from vtp.serve.streams import cli

number, most = int(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)
say, said = cli.say_answer, []

def say_and_signal(answer):
    say(answer)
    said.append(answer)
    if number and len(said) == 4:
        signal.raise_signal(number)

cli.say_answer = say_and_signal
if most:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
sys.exit(cli.main(sys.argv[3:]))
"""


def run_alone(*arguments: object, number: int = 0, most: int = 0) -> tuple[int, int, str]:
    """As `run`, in a process of its own.

    number  the signal that comes while the fourth answer is printed
    most    bytes that a file may have, as on a full disk
    """
    command = [sys.executable, "-c", _COMMAND, str(number), str(most), *map(str, arguments), *ASKED]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, len(done.stdout.splitlines()), done.stderr


@pytest.mark.parametrize(
    ("number", "suffix", "code"), [(signal.SIGINT, ".mp4", 130), (signal.SIGTERM, ".mkv", 143)]
)
def test_a_signal_ends_the_file_well(
    tiny: Path, tmp_path: Path, number: signal.Signals, suffix: str, code: int
) -> None:
    clip, path = write_video(tmp_path / "clip.mp4", moving(6)), tmp_path / f"kept{suffix}"
    left, _, error = run_alone(tiny, clip, "--every-frame", "--show-kept", path, number=number)
    assert left == code, error
    assert len(decoded(path)) == 3


def test_a_source_that_is_lost_ends_the_file_well(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[FrameAnswer] = []
    with camera(lambda place: scene()) as live:

        def say(answer: FrameAnswer) -> None:
            said.append(answer)
            if len(said) == 3:
                live.down()

        monkeypatch.setattr(cli, "say_answer", say)
        path = tmp_path / "kept.mp4"
        code, _, error = run(capsys, tiny, live.url, "--timeout", "1", "--show-kept", path)
    assert (code, len(decoded(path))) == (1, len(said)), error
    assert "secret" not in error


@pytest.mark.parametrize(("suffix", "left"), [(".mp4", "it is removed"), (".mkv", "it plays up to there")])
def test_a_full_disk_is_one_line(tiny: Path, tmp_path: Path, suffix: str, left: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 240, 320, 3), dtype=np.uint8)
    clip, path = write_video(tmp_path / "clip.mp4", noise, fps=2), tmp_path / f"kept{suffix}"
    wishes = (tiny, clip, "--every-frame", "--keep-tokens", "6", "--show-kept", path)
    code, count, error = run_alone(*wishes, most=60_000)
    lines = [line for line in error.splitlines() if "error" in line]
    assert code == 1 and 0 < count < 9
    assert len(lines) == 1 and f"cannot write '{path}': File too large; {left}" in lines[0]
    assert path.exists() == (suffix == ".mkv")
    if path.exists():
        with av.open(str(path)) as file:
            assert next(file.decode(video=0)).width == 320


# -- before the model is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("kept.avi", 2, "is neither .mp4 nor .mkv; give a video of these, or a folder for pictures"),
        ("kept.PNG", 2, "is neither .mp4 nor .mkv"),
        ("there.mp4", 2, "is there already; give another file"),
        ("link.mkv", 2, "is there already; give another file"),
        ("absent/kept.mp4", 2, "absent' does not exist; make it first"),
        ("there", 2, "is not a folder; give one"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, words: str
) -> None:
    """No bundle is there either: the complaint is about what is cheap to check."""
    for there in ("there.mp4", "there"):
        (tmp_path / there).touch()
    (tmp_path / "link.mkv").symlink_to(tmp_path / "nowhere")
    left, _, error = run(capsys, tmp_path / "no-bundle", tmp_path, "--show-kept", tmp_path / name)
    assert left == code and words in error and len(error.splitlines()) == 1
    assert (tmp_path / "there.mp4").read_bytes() == b""


def test_a_folder_may_have_any_name(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is there is a folder, whatever its suffix."""
    source = pictures(tmp_path / "in", (32, 24))
    (tmp_path / "kept.mp4").mkdir()
    for name in ("kept.mp4", "v1.2"):
        assert run(capsys, tiny, source, "--show-kept", tmp_path / name)[0] == 0
        assert [path.name for path in (tmp_path / name).iterdir()] == ["frame-00000000.jpg"]


def test_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (tmp_path / "no-bundle", tmp_path, "--show-kept", tmp_path / "kept.mkv")
    with monkeypatch.context() as patch:
        patch.setattr(kept, "_ENCODERS", {"no-such": {}})
        code, _, error = run(capsys, *asked)
        assert code == 1 and "FFmpeg has no video encoder (no-such); give --show-kept a folder" in error
    monkeypatch.setitem(sys.modules, "av", None)
    code, _, error = run(capsys, *asked)
    assert code == 1 and "pip install 'vtp-edge[streams]'" in error and len(error.splitlines()) == 1


def test_without_x264_another_encoder_is_taken(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_ENCODERS", {"no-such": {}, "mpeg4": kept._ENCODERS["mpeg4"]})
    given = answers(pipe, pictures(tmp_path / "in", (64, 48), (64, 48)))
    with KeptVideo(tmp_path / "kept.mp4", pipe.manifest) as video:
        for answer in given:
            video(answer)
    with av.open(str(tmp_path / "kept.mp4")) as file:
        assert file.streams.video[0].codec_context.name == "mpeg4"
    shown = decoded(tmp_path / "kept.mp4")
    assert max(far(one, drawn(pipe, answer)) for one, answer in zip(shown, given, strict=True)) < NEAR


def test_a_file_that_came_meanwhile_is_left_as_it_is(pipe: Pipeline, tmp_path: Path) -> None:
    (given,) = answers(pipe, pictures(tmp_path / "in", (64, 48)))
    video = KeptVideo(tmp_path / "kept.mp4", pipe.manifest)
    (tmp_path / "kept.mp4").write_bytes(b"mine")
    with pytest.raises(VtpError, match="is there already"):
        video(given)
    video.close()
    assert (tmp_path / "kept.mp4").read_bytes() == b"mine"
