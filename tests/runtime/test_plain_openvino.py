"""The program for plain OpenVINO in docs/examples: run as it is, it says what the pipeline says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtp.runtime import Pipeline
from vtp.scenes import examples_dir

from ..once import Once

pytest.importorskip("openvino", reason="openvino is not installed")
PROGRAM = Path(__file__).parents[2] / "docs/examples/plain_openvino.py"


def said(bundle: Path, picture: Path, question: str) -> str:
    """What the program prints; it imports nothing of vtp."""
    assert "vtp" not in {
        line.split()[1] for line in PROGRAM.read_text().splitlines() if line.startswith("import")
    }
    command = [sys.executable, "-P", str(PROGRAM), str(bundle), str(picture), question]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.removesuffix("\n")


def wanted(bundle: Path, picture: Path, question: str) -> str:
    """The pipeline's twelve tokens on ONNX Runtime, decoded as the program does."""
    with Pipeline.load(bundle, "ort-cpu") as pipe:
        ids = pipe.generate(str(picture), question, max_new_tokens=12).token_ids
        return pipe._prompter.tokenizer.decode(ids)


def test_it_answers_as_the_pipeline(once: Once, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = once.bundle(
        model_folder("gqa"), method="fastervlm", keep_tokens="6", max_length=128, verify="none"
    )
    noise = np.random.default_rng(3).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    asked = bundle, tmp_path / "picture.png", "what shape is the red ?"
    assert said(*asked) == wanted(*asked) != ""


@pytest.mark.slow
def test_it_answers_as_the_pipeline_on_the_built_in_model(once: Once) -> None:
    from vtp.export.exporter import Request, export

    bundle = once.folder(
        "plain-openvino", lambda part: export(Request(part, method="fastervlm", verify="none"))
    )
    for question in ("what color is the star ?", "where is the circle ?", "what shape is the purple ?"):
        asked = bundle, examples_dir() / "scene.png", question
        assert said(*asked) == wanted(*asked) != ""
