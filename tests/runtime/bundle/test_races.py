"""A bundle that is replaced while it is loaded, and commands that are asked to end."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtp.engines import VtpError
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import MANIFEST, open_bundle, set_calibration, whole_bundle
from vtp.runtime.stages import runner as stages


def replace(target: Path, source: Path) -> None:
    with whole_bundle(target, overwrite=True) as aside:
        for file in source.iterdir():
            shutil.copyfile(file, aside / file.name)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("waits", [30.0, 0.0], ids=["behind the lock", "without a lock"])
def test_a_pipeline_is_of_one_bundle(
    bundle: Path, exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, waits: float
) -> None:
    """Replaced after its first graph was opened: the graphs are of one bundle, and answer as it does."""
    other = exported("vispruner").folder
    picture = b"".join([b"P6 8 8 255\n", bytes(range(192))])
    answers = {}
    for folder in (bundle, other):
        with Pipeline.load(folder, threads=1) as pipe:
            answers[pipe.manifest.method.name] = pipe.generate(picture, "what ?", max_new_tokens=4).token_ids
    monkeypatch.setattr("vtp.engines.disk.whole._WRITER_WAITS", waits)
    writer = threading.Thread(target=replace, args=(bundle, other))
    opened: list[str] = []
    open_stage = stages.open_stage

    def open_and_replace(some: Any, file: str, *more: Any, **named: Any) -> Any:
        engine = open_stage(some, file, *more, **named)
        opened.append(some.manifest.method.name)
        if not writer.ident:
            writer.start()
            writer.join(1.0 if waits else 30)
        return engine

    monkeypatch.setattr(stages, "open_stage", open_and_replace)
    with Pipeline.load(bundle, threads=1, check_hashes=True) as pipe:
        name = pipe.manifest.method.name
        assert name == ("none" if waits else "vispruner")
        assert pipe.generate(picture, "what ?", max_new_tokens=4).token_ids == answers[name]
    writer.join(30)
    assert open_bundle(bundle, check_hashes=True).manifest.method.name == "vispruner"
    assert names(bundle.parent) == {"bundle"}


def test_a_calibration_does_not_land_in_another_bundle(bundle: Path, exported: Callable[[str], Any]) -> None:
    measured = open_bundle(bundle).manifest
    replace(bundle, exported("vispruner").folder)
    before = (bundle / MANIFEST).read_text()
    with pytest.raises(VtpError, match="was replaced while it was calibrated"):
        set_calibration(bundle, measured.visual.default_keep, {}, measured)
    assert (bundle / MANIFEST).read_text() == before
    assert names(bundle.parent) == {"bundle"}


WORKING = """
import sys, time
from pathlib import Path
import signal
from vtp.runtime.bundle.folder import whole_bundle
from vtp.runtime.commands.console import run_command
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
def wait():
    for _ in range(600):  # a single long sleep may begin just behind the signal, and outlast it
        time.sleep(0.1)
def work():
    with whole_bundle(Path(sys.argv[1])) as aside:
        (aside / "half").write_text("x")
        print("writing", flush=True)
        wait()
sys.exit(run_command("vtp-x", work))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_ends_a_command_cleans_up(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", WORKING, str(tmp_path / "deep" / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(how)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + how
    assert errors.startswith("vtp-x: error: ") and errors.endswith("; nothing was left behind\n")
    assert errors.count("\n") == 1
    assert names(tmp_path) == set()


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """`nohup vtp-export ...` goes on when its terminal closes."""
    script = WORKING.replace(
        "        wait()", "        sys.stdin.readline(); (aside / 'manifest.json').touch()"
    )
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + script
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGHUP)
        process.communicate("go on\n", timeout=60)
    assert process.returncode == 0
    assert names(tmp_path / "out") == {"half", "manifest.json"}
