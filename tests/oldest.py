"""Answers of bundles with whatever versions run this file: written by one environment, compared by another.

    python tests/oldest.py write FILE BUNDLE...      answers of this environment
    python tests/oldest.py compare FILE              the same questions here; 1 where answers differ

Imports what the runtime needs and nothing else: no torch, no pytest. `make test-oldest` runs it with the
oldest versions that docs/engines.md names.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from vtp.runtime import Pipeline, doctor

PROMPTS = ("what color is the star ?", "how many circle ?")
PACKAGES = ("onnxruntime", "numpy", "tokenizers", "pillow", "jinja2")


def answers(folder: str) -> list[dict]:
    """Greedy tokens and kept indices of two questions about a picture of noise."""
    picture = np.random.default_rng(3).integers(0, 256, (120, 90, 3), dtype=np.uint8)
    with Pipeline.load(folder, engine="ort-cpu", threads=1) as pipe:
        results = [pipe.generate(Image.fromarray(picture), prompt, max_new_tokens=8) for prompt in PROMPTS]
    return [{"tokens": result.token_ids, "text": result.text, "kept": result.kept} for result in results]


def main(action: str, file: str, *folders: str) -> int:
    """See the module's words."""
    here = {name: metadata.version(name) for name in PACKAGES}
    print(f"Python {platform.python_version()}", here)
    if action == "write":
        Path(file).write_text(json.dumps({folder: answers(folder) for folder in folders}), encoding="utf-8")
        return 0
    if doctor.main([]) != 0:
        return 1
    differ = 0
    for folder, wanted in json.loads(Path(file).read_text(encoding="utf-8")).items():
        found = answers(folder)
        differ += found != wanted
        print(f"{folder}: {'the same answers' if found == wanted else f'{found} instead of {wanted}'}")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
