"""Commands that take a bundle of the hub: the real ones against the stand-in, through the environment."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from vtp.bench import cli as bench
from vtp.calib import cli as calib
from vtp.runtime import Pipeline
from vtp.runtime.commands import doctor, run
from vtp.runtime.hub.bundles import local_bundle
from vtp.serve import cli as serve
from vtp.serve.robots.model import Model
from vtp.serve.robots.settings import Settings
from vtp.serve.streams import cli as watch

from ...stand_ins.hub_server import TOKEN, Hub, environment


def asked(hub: Hub, home: Path, picture: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """vtp-run on org/name, in a process of its own that has only its environment."""
    command = [sys.executable, "-m", "vtp.runtime.commands.run", "org/name", "--image", str(picture)]
    return subprocess.run(
        [*command, "--prompt", "what is it ?", "--max-new-tokens", "3", *flags],
        env={**environment(hub, home), "HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_vtp_run(hub: Hub, tmp_path: Path, picture_file: Path, pipe: Pipeline) -> None:
    """For people: the size, then the commit. For programs: one object, nothing beside it."""
    commit = hub.repos["org/name"].refs["main"]
    home = tmp_path / "fresh"
    first = asked(hub, home, picture_file)
    assert first.returncode == 0, first.stderr
    assert f"vtp-run: note: org/name@{commit[:12]} on the hub: 12 files, " in first.stderr
    assert f"vtp-run: note: bundle org/name@{commit}\n" in first.stderr and "\r" not in first.stderr
    again = asked(hub, tmp_path / "another", picture_file, "--json")
    assert again.returncode == 0 and again.stderr == ""
    said = json.loads(again.stdout)
    assert said["origin"] == f"org/name@{commit}"
    wanted = pipe.generate(picture_file, "what is it ?", max_new_tokens=3)
    assert said["text"] == wanted.text == first.stdout.rstrip("\n")
    assert TOKEN not in first.stderr + first.stdout + again.stdout
    assert {token for _, path, token in hub.asked if "org/name" in path} == {TOKEN}


def test_what_cannot_be_had_is_one_line(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["org/nothing", "--prompt", "x"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(
        "vtp-run: error: no such folder, and nothing on the hub that you may read: org/nothing"
    )


def test_vtp_doctor(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["org/name", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    bundle = json.loads(out)["bundle"]
    assert bundle["folder"] == str(local_bundle("org/name"))
    assert bundle["origin"] == f"org/name@{hub.repos['org/name'].refs['main']}"


def test_vtp_serve_names_it_after_the_repository(hub: Hub, files: dict[str, bytes]) -> None:
    parsed = serve.build_parser().parse_args(["org/name@main", "--shadow", "org/name"])
    assert serve.names_of(parsed) == ["name"]
    serve._take_bundles(parsed)
    assert parsed.bundle == [parsed.shadow] == [str(local_bundle("org/name"))]
    assert serve.names_of(parsed) == ["name"]  # of its folder, which is a commit


def test_vtp_bench_names_it_after_the_repository(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(bench, "in_child", lambda task: taken.append(task) or {})
    assert bench.main(["org/name", "--json"]) == 0
    assert taken[0].bundle == str(local_bundle("org/name"))
    bundle = json.loads(capsys.readouterr().out)["bundle"]
    assert bundle["name"] == "name" and bundle["origin"].startswith("org/name@")


def test_vtp_calib_changes_nothing_of_the_hub(
    hub: Hub, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its default would be another bundle than the commit's; what it writes goes to the current folder."""
    question = {"image": str(picture_file), "prompt": "x", "answer": "y"}
    Path("questions.jsonl").write_text(json.dumps(question))
    assert calib.main(["keep", "org/name", "--data", "questions.jsonl"]) == 2
    err = capsys.readouterr().err
    assert "lies in the hub's cache, where bundles are not changed; copy it with: hf download org/name" in err
    folder = local_bundle("org/name")
    opened = Namespace(folder=folder, origin="org/name@x")
    assert calib.beside(opened, "calib") == Path("name-calib")
    assert not Path("name-calib").exists()


def test_vtp_watch_and_ros2(hub: Hub) -> None:
    """Both open the pipeline themselves, before any frame comes."""
    parsed = watch.build_parser().parse_args(["org/name", "frames", "--prompt", "x", "--threads", "1"])
    with watch._pipeline(parsed, 1) as pipe:
        assert pipe.bundle.folder == local_bundle("org/name")
    with Model.load(Settings(bundle="org/name", prompt="what is it ?", threads=1)).pipeline as pipe:
        assert pipe.bundle.folder == local_bundle("org/name")
