"""vtp-watch as users start it: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.runtime import Pipeline
from vtp.serve.streams.cli import main, until_of

from ...models.tiny_video import save_video_llava
from ...once import Once
from .mjpeg import camera
from .moving import decoded, moving, scene, write_video

COMMAND = [sys.executable, "-c", "import sys; from vtp.serve.streams.cli import main; sys.exit(main())"]
PROMPT = "what is it ?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second at 10 frames."""
    return write_video(tmp_path_factory.mktemp("clip") / "moving.mp4", moving(10), fps=10)


@pytest.fixture(scope="module")
def tiny(exported: Callable[[str], Any]) -> Path:
    return exported("vispruner").folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error; of argparse's complaints as well."""
    try:
        code = main([*map(str, arguments), "--threads", "1"])
    except SystemExit as left:
        code = int(left.code or 0)
    out, error = capsys.readouterr()
    return code, out, error


# -- answers -------------------------------------------------------------------------------------------------


def test_json_lines_are_the_pipelines_answers(
    tiny: Path, clip: Path, pipe: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--prompt", PROMPT, "--every-frame", "--max-new-tokens", 5, "--keep-tokens", 3)
    code, out, error = run(capsys, tiny, clip, *asked, "--json")
    lines, frames = [json.loads(line) for line in out.splitlines()], decoded(clip)
    assert code == 0 and len(lines) == len(frames) == 10
    for number, (line, picture) in enumerate(zip(lines, frames, strict=True)):
        right = pipe.generate(picture, PROMPT, max_new_tokens=5, keep_tokens=3)
        assert (line["text"], line["finish_reason"]) == (right.text, right.finish_reason)
        assert line["visual_tokens"] == {"before": 16, "after": 3} and line["prompt"] == PROMPT
        told = line["frame"]
        assert (told["number"], told["stamp_ns"], told["clock"]) == (number, number * 10**8, "media")
        assert 0 <= told["asked_age_ms"] <= told["age_ms"] and line["dropped"] == 0
        assert {"vision_encoder", "ttft", "total"} <= set(line["timings"])
    assert "10 frames seen, 10 asked about, 0 dropped in " in error and "p95" in error


def test_frames_are_recomputed_in_part(
    exported: Callable[[str], Any], clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several questions about a frame share the tower's run; a new watch begins with a whole frame."""
    asked = ("--prompt", PROMPT, "--alert", "what is it ? [red|blue]", "--labels", "texts", "--every-frame")
    code, out, error = run(
        capsys, exported("stc").folder, clip, *asked, "--max-new-tokens", 1, "--json", "--stream-reuse"
    )
    lines = [json.loads(line) for line in out.splitlines()]
    rows = [line["tower"]["rows"] for line in lines]
    assert code == 0 and len(rows) == 10 and rows[0] == rows[4] == 17 and rows[1] == 4
    assert all("cosine" in line["tower"] for line in lines if line["tower"]["rows"] == 4)
    assert not any(name.startswith("vision_encoder") for line in lines for name in line["timings"])
    assert f", {rows.count(4)} recomputed in part in " in error


def test_a_method_that_compares_frames_is_given_the_one_before(
    exported: Callable[[str], Any], clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, told = exported("change").folder, "without --stream-reuse that is what differs from grey"
    asked = ("--prompt", PROMPT, "--every-frame", "--max-new-tokens", 1, "--until", 1, "--json")
    code, _, error = run(capsys, folder, clip, *asked)
    assert code == 0 and told in error
    code, out, error = run(capsys, folder, clip, *asked, "--stream-reuse")
    assert code == 0 and told not in error and "tower" not in json.loads(out)


def test_lines_for_people(tiny: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--prompt", PROMPT, "--every-frame", "--max-new-tokens", 2)
    code, out, _ = run(capsys, tiny, clip, *asked, "--until", 2)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2
    assert lines[1].startswith("0:00.100  ") and "(16 → 6 tokens, " in lines[1] and " ms old" in lines[1]


def test_an_alert_of_the_built_in_model(
    builtin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two pictures with a blue star, two with another answer: raised, cleared, and told to a command."""
    for number, name in enumerate(("scene2.png", "scene.png", "scene.png", "scene2.png")):
        Image.fromarray(scene(name)).save(tmp_path / f"{number}.png")
    question = "what color is the star ? [blue|green|red|pink|cyan|purple|orange|yellow]"
    log = tmp_path / "log"
    asked = ("--alert", question, "--labels", "texts", "--on-alert", f"sh -c 'cat >> {log}; echo >> {log}'")
    code, out, error = run(capsys, builtin, tmp_path, *asked, "--json")
    readings = [json.loads(line)["alerts"][0] for line in out.splitlines()]
    with Pipeline.load(builtin, threads=1) as pipe:
        options = question.partition("[")[2].strip("]").split("|")
        for reading, name in zip(
            readings, ("scene2.png", "scene.png", "scene.png", "scene2.png"), strict=True
        ):
            right = pipe.decide(Image.fromarray(scene(name)), reading["question"], options, labels="texts")
            assert reading["probability"] == pytest.approx(right.probabilities["blue"], abs=1e-6)
    assert code == 0, error
    assert [reading["event"] for reading in readings] == ["", "raised", "", "cleared"]
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(one["event"], one["frame"]["name"]) for one in told] == [
        ("raised", "1.png"),
        ("cleared", "3.png"),
    ]
    assert {one["source"] for one in told} == {str(tmp_path)}


def test_a_gate_and_pictures_of_what_was_kept(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = write_video(tmp_path / "still.mp4", [scene()] * 5 + [scene("scene2.png")] * 5)
    asked = ("--prompt", PROMPT, "--every-frame", "--max-new-tokens", 1, "--gate")
    code, out, error = run(capsys, tiny, still, *asked, "--json", "--show-kept", tmp_path / "kept")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(line["frame"]["number"], line["gate"]["skipped"]) for line in lines] == [(0, 0), (5, 4)]
    assert lines[1]["gate"]["change"] > 0.03 and "8 skipped (nothing changed)" in error
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert kept == ["frame-00000000.jpg", "frame-00000005.jpg"]
    assert Image.open(tmp_path / "kept" / kept[0]).size == (336, 336)


def test_until() -> None:
    assert until_of(None) == (None, None)
    assert until_of("12") == (12, None) and until_of("1.5s") == (None, 1.5)


# -- while it runs -------------------------------------------------------------------------------------------


class Watching:
    """The command in a process of its own, whose standard error is read as it comes."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments), "--threads", "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()
        return json.loads(line)

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def end(self, number: int) -> tuple[int, list[str]]:
        """Exit code and standard error after a signal."""
        self.process.send_signal(number)
        _, error = self.process.communicate(timeout=60)
        return self.process.returncode, error.splitlines()


@contextmanager
def watching(*arguments: object) -> Iterator[Watching]:
    one = Watching(*arguments)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_cleanly(tiny: Path, number: int, code: int) -> None:
    with (
        camera(lambda place: np.roll(scene(), 3 * place, axis=1)) as live,
        watching(tiny, live.url, "--prompt", PROMPT, "--json", "--max-new-tokens", 2) as watch,
    ):
        first = watch.answer()
        watch.answer()
        left, said = watch.end(number)
    assert left == code and first["frame"]["clock"] == "unix"
    assert first["source"] == f"http://127.0.0.1:{live.port}/live.mjpg"
    assert abs(first["frame"]["stamp_ns"] - time.time_ns()) < 120 * 10**9
    assert len(said) == 2 and " frames seen, " in said[0] and said[1].endswith("; the watch is over")
    assert "secret" not in "".join(said)


def test_loss_and_return_are_told_in_a_line_each(tiny: Path) -> None:
    with (
        camera(lambda place: scene()) as live,
        watching(tiny, live.url, "--prompt", PROMPT, "--json", "--max-new-tokens", 1) as watch,
    ):
        last = watch.answer()["frame"]["number"]
        live.down()
        time.sleep(1.0)
        live.up()
        sent = live.sent
        while live.sent < sent + 5:
            time.sleep(0.05)
        while watch.answer()["frame"]["number"] <= last + 5:
            pass
        left, said = watch.end(signal.SIGINT)
    said = [line for line in said if "stopping…" not in line]  # of a slow machine
    assert left == 130
    assert [line for line in said if "lost" in line or "is back" in line] == said[:2] and len(said) == 4
    assert "secret" not in "".join(said)


def test_a_stream_that_stops_for_ever_ends_with_the_timeout(tiny: Path) -> None:
    with (
        camera(lambda place: scene()) as live,
        watching(tiny, live.url, "--prompt", PROMPT, "--json", "--timeout", "1.5") as watch,
    ):
        watch.answer()
        live.silent.set()
        watch.process.communicate(timeout=60)
        assert watch.process.returncode == 1


def test_the_prompt_is_changed_by_a_line(tiny: Path) -> None:
    with (
        camera(lambda place: scene()) as live,
        watching(tiny, live.url, "--prompt", PROMPT, "--json", "--stdin", "--max-new-tokens", 1) as watch,
    ):
        assert watch.answer()["prompt"] == PROMPT
        watch.say("\nwhat <image> is it ?\nanother")
        watch.say(" one\n")
        while (prompt := watch.answer()["prompt"]) == PROMPT:
            pass
        left, said = watch.end(signal.SIGINT)
    assert prompt == "another one" and left == 130
    assert said[0].startswith("vtp-watch: note: the question stays as it is: ")
    assert said[1] == "vtp-watch: note: the question is now: another one"


def test_a_terminal_takes_questions_without_being_told(tiny: Path) -> None:
    """On a pseudo-terminal of its own, in whose foreground it is."""
    with camera(lambda place: scene()) as live:
        ours, theirs = os.openpty()
        script = "import os, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        asked = (str(tiny), live.url, "--prompt", PROMPT, "--json", "--max-new-tokens", "1", "--threads", "1")
        process = subprocess.Popen(
            [sys.executable, "-c", script + COMMAND[2], *asked],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            process.stdout.readline()
            os.write(ours, b"another one\n")
            while json.loads(process.stdout.readline())["prompt"] == PROMPT:
                pass
            os.write(ours, b"\x03")  # Ctrl-C
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
            os.close(ours)
            os.close(theirs)
    assert process.returncode == 130 and "the question is now: another one" in error


def test_until_seconds_ends_in_the_middle_of_a_stream(tiny: Path) -> None:
    with (
        camera(lambda place: scene()) as live,
        watching(tiny, live.url, "--prompt", PROMPT, "--json", "--until", "2s") as watch,
    ):
        _, error = watch.process.communicate(timeout=60)
    assert watch.process.returncode == 0 and error.count("\n") == 1


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("CLIP",), 2, "nothing is asked: give a prompt, or at least one alert"),
        (("CLIP", "--prompt", " "), 2, "the prompt is empty"),
        (("/dev/video99", "--prompt", "a"), 2, "no such camera: /dev/video99"),
        (("absent.mp4", "--prompt", "a"), 2, "no such file or folder: absent.mp4"),
        (("TEXT", "--prompt", "a"), 1, "cannot open "),
        (
            ("rtsp://u:secret@127.0.0.1:9/x", "--prompt", "a"),
            1,
            "cannot open rtsp://127.0.0.1:9/x: Connection",
        ),
        (("CLIP", "rtsp://u:secret@h/x", "--prompt", "a"), 2, "unrecognized arguments: rtsp://h/x"),
        (("CLIP", "--prompt", "a", "--every", "-1"), 2, "every -1.0 is not a number of seconds"),
        (("CLIP", "--prompt", "a", "--timeout", "0"), 2, "timeout 0.0 is not a number of seconds"),
        (("CLIP", "--prompt", "a", "--until", "x"), 2, "until 'x' is not a whole number"),
        (("CLIP", "--prompt", "a", "--until", "0s"), 2, "until '0' is not a number above 0"),
        (("CLIP", "--prompt", "a", "--gate", "2"), 2, "a change of 2.0 is not allowed"),
        (("CLIP", "--prompt", "a", "--fps", "3"), 2, "--fps is for a folder of pictures"),
        (("CLIP", "--prompt", "a", "--keep-tokens", "5"), 2, "keep"),
        (("CLIP", "--prompt", "a", "--on-alert", "true"), 2, "need an --alert"),
        (("CLIP", "--alert", "a", "--threshold", "2"), 2, "threshold 2.0 is not allowed"),
        (
            ("CLIP", "--alert", "a", "--threshold", ".1", "--threshold", ".2"),
            2,
            "2 thresholds are given for 1",
        ),
        (("CLIP", "--alert", "a [b|b]"), 2, "'b' is given twice"),
        (("CLIP", "--alert", "a", "--on-alert", "no-such-program"), 2, "names no program"),
        (("CLIP", "--alert", "a", "--webhook", "ftp://u:secret@h"), 2, "'ftp://h' is not an http://"),
        (("CLIP", "--prompt", "a", "--show-kept", "absent/kept"), 2, "the folder 'absent' does not exist"),
    ],
)
def test_bad_input_is_one_line(
    tiny: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.mp4"
    text.write_bytes(np.random.default_rng(0).bytes(999))
    given = [{"CLIP": str(clip), "TEXT": str(text)}.get(one, one) for one in arguments]
    left, out, error = run(capsys, tiny, *given)
    last = error.splitlines()[-1]
    assert (left, out) == (code, "") and last.startswith("vtp-watch: error: ") and line in last, error
    assert "Traceback" not in error and "secret" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["text.mp4"]


@pytest.mark.slow  # test_watcher.py holds the check itself
def test_a_bundle_for_clips_is_refused(once: Once, saved: Any, clip: Path, capsys: Any) -> None:
    folder, _ = saved(save_video_llava)
    wishes: dict[str, Any] = {"method": "none", "frames": 2, "max_length": 128, "verify": "none"}
    code, out, error = run(capsys, once.bundle(folder, **wishes), clip, "--prompt", "a")
    assert (code, out) == (2, "") and "this bundle answers about clips of 2 frames" in error


def test_without_pyav_a_line_says_what_to_install(tiny: Path, clip: Path) -> None:
    script = "import sys; sys.modules['av'] = None; " + COMMAND[2]
    command = [sys.executable, "-c", script, str(tiny), str(clip), "--prompt", "a", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pip install 'vtp-edge[streams]'" in done.stderr


def test_lines_of_a_closed_standard_input_are_refused(tiny: Path, clip: Path) -> None:
    """Its number may be that of any file that is opened later, whose bytes would be taken for prompts."""
    line = 'exec "$0" "$@" <&-'
    command = ["sh", "-c", line, *COMMAND, str(tiny), str(clip), "--prompt", "a", "--stdin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("vtp-watch: error: --stdin reads standard input, which is closed")
    assert len(done.stderr.splitlines()) == 1
