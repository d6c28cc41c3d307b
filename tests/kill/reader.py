"""Loads a bundle again and again while others replace it: each time one whole bundle, with its own answer.

python -m tests.kill.reader answer BUNDLE            what it answers, as JSON
python -m tests.kill.reader loop TARGET KNOWN STOP   until the file STOP is there; counts and complaints
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vtp.runtime import Pipeline

PICTURE = np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def answer(folder: Path) -> dict[str, Any]:
    """What a bundle says about a picture of noise, whose bundle that was, and what it kept."""
    with Pipeline.load(folder, engine="ort-cpu", threads=1, check_hashes=True) as pipe:
        result = pipe.generate(PICTURE, "what is it ?", max_new_tokens=6)
        files = {name: info.sha256 for name, info in pipe.manifest.files.items()}
    return {"files": files, "tokens": result.token_ids, "kept": list(result.kept)}


def loop(target: Path, known: list[dict[str, Any]], stop: Path) -> dict[str, Any]:
    """Answers of `target` until `stop` is there: how many of each known bundle, and every other outcome."""
    seen, bad = [0] * len(known), []
    while not stop.exists():
        try:
            found = json.loads(json.dumps(answer(target)))
        except Exception as error:
            bad.append(f"{type(error).__name__}: {error}")
            continue
        if found in known:
            seen[known.index(found)] += 1
        else:
            bad.append(f"an answer of neither: {found['tokens']}")
    return {"seen": seen, "bad": bad}


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        print(json.dumps(answer(Path(sys.argv[2]))))
    else:
        print(
            json.dumps(loop(Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()), Path(sys.argv[4])))
        )
