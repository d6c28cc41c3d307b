"""Questions of the calibration tests, whose accepted answers are what the unpruned model says."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path

import numpy as np
from PIL import Image

from vtp.runtime import Pipeline


def unpruned_answers(folder: Path, bundle: Path, count: int, wrong: Container[int] = ()) -> Path:
    """A JSONL file of `count` questions about pictures of noise; "x" is the answer to those in `wrong`."""
    rng = np.random.default_rng(3)
    with Pipeline.load(bundle, threads=1) as pipe, (folder / "d.jsonl").open("w") as out:
        for number in range(count):
            picture = folder / f"{number}.png"
            Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(picture)
            prompt = f"what is {number} ?"
            text = "x" if number in wrong else pipe.generate(picture, prompt, max_new_tokens=4).text
            out.write(json.dumps({"image": picture.name, "prompt": prompt, "answer": text}) + "\n")
    return folder / "d.jsonl"
