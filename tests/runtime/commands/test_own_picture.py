"""vtp-run with a bundle alone: a question about the picture that comes with vtp."""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import tomllib
from PIL import Image

from vtp.runtime import Pipeline
from vtp.runtime.commands.run import main
from vtp.runtime.media.own_picture import OWN_PICTURE, OWN_QUESTION

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bundle(exported: Callable[[str], Any]) -> str:
    return str(exported("vispruner").folder)


def test_a_bundle_alone_is_asked_about_vtps_picture(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with Pipeline.load(bundle, threads=1) as pipe:
        wanted = pipe.generate(OWN_PICTURE, OWN_QUESTION, max_new_tokens=4)
    assert main([bundle, "--max-new-tokens", "4", "--json", "--show-kept", "kept.png"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["token_ids"] == wanted.token_ids
    assert OWN_QUESTION in err and "--image and --prompt ask about yours" in err
    assert Image.open("kept.png").size == (336, 336)


def test_a_picture_without_a_question_is_still_refused(
    bundle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([bundle, "--image", str(OWN_PICTURE)]) == 2
    assert "required: --prompt" in capsys.readouterr().err


def test_the_picture_is_small_and_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["package-data"]
    assert any(fnmatch(OWN_PICTURE.name, pattern) for pattern in packages["vtp.runtime.media"])
    assert OWN_PICTURE.stat().st_size < 20_000
    with Image.open(OWN_PICTURE) as picture:
        picture.load()
