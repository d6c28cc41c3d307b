"""What SmolLM2's vocabulary has and the tiny one lacks: a piece of two line ends, and digits one by one."""

from __future__ import annotations

import json
from pathlib import Path


def add_blank_line(folder: Path) -> None:
    """Put both into the folder's tokenizer.json; the piece takes the place of the one learnt last."""
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    vocabulary, merges = told["model"]["vocab"], told["model"]["merges"]
    last = merges.pop()
    vocabulary["ĊĊ"] = vocabulary.pop("".join(last))
    merges.append(["Ċ", "Ċ"])
    digits = {"type": "Digits", "individual_digits": True}
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, told["pre_tokenizer"]]}
    path.write_text(json.dumps(told), encoding="utf-8")
