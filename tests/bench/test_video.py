"""`vtp-bench --video` on a tiny bundle: what is counted, shown and refused. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vtp.bench import cli

from ..serve.streams.moving import moving, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "moving.mp4", moving(45))


def test_figures_of_a_video(exported: Any, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported("vispruner").folder
    asked = [
        str(folder),
        "--video",
        str(clip),
        "--max-new-tokens",
        "2",
        "--keep-tokens",
        "3",
        "--threads",
        "1",
    ]
    assert cli.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    watch = found["watch"]
    assert watch["seen"] == 45 and 1 <= watch["asked"] <= 45 and watch["asked"] + watch["dropped"] <= 45
    assert found["visual_tokens"] == {"before": 16, "after": 3}
    assert watch["asked_age_ms"]["p50"] <= watch["asked_age_ms"]["p95"] <= watch["asked_age_ms"]["max"]
    assert watch["age_ms"]["p50"] > watch["asked_age_ms"]["p50"]
    assert {one["stage"]: one["ms"]["runs"] for one in found["stages"]}["vision_encoder"] == watch["asked"]
    assert found["ttft_ms"]["runs"] == watch["asked"] and found["settings"]["video"] == "moving.mp4"
    assert cli.main(asked) == 0
    shown = capsys.readouterr().out
    assert "age at the answer, ms" in shown and "45 came in " in shown and "vision_encoder" in shown


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--video", "absent.mp4"], "'absent.mp4' is not a file"),
        (["--video", "/dev/null"], "'/dev/null' is not a file"),
        (["--video", "a.mp4", "--image", "b.png"], "leave out --image, --csv, --plot and --engines"),
    ],
)
def test_what_is_refused(
    exported: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert cli.main([str(exported("vispruner").folder), *arguments]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
