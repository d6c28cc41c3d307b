"""The three public sets in small: files in the shapes that their authors give out, with made pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KINDS = ("random", "popular", "adversarial")


def picture(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (60, 80, 3) if seed % 2 else (50, 40, 3)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(file)


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def gqa(folder: Path, answers: Sequence[str]) -> None:
    """Questions 0, 1, … of GQA, every second one open."""
    entries = {}
    for place, answer in enumerate(answers):
        types = {"detailed": "x", "semantic": "attr", "structural": "verify" if place % 2 else "query"}
        asked = {"imageId": f"n{place}", "question": f"What is thing {place}?", "answer": answer}
        extra = {
            "isBalanced": True,
            "semantic": [],
            "fullAnswer": "",
            "groups": {"local": None},
            "types": types,
        }
        entries[f"20{place}"] = {**extra, **asked}
        picture(folder / f"images/n{place}.jpg", place)
    write(folder / "testdev_balanced_questions.json", entries)


def textvqa(folder: Path, answers: Sequence[Sequence[str]], words: bool = True) -> None:
    """Questions 0, 1, … of TextVQA, with ten answers each, and what an OCR read."""
    asked, read = [], []
    for place, given in enumerate(answers):
        entry = {"image_id": f"00{place}af", "question": f"what does sign {place} say?", "question_id": place}
        asked.append({**entry, "question_tokens": [], "image_classes": ["Sign"], "answers": list(given)})
        read.append({"image_id": f"00{place}af", "ocr_tokens": ["STOP", str(place)], "ocr_info": []})
        picture(folder / f"train_images/00{place}af.jpg", 10 + place)
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write(folder / "TextVQA_0.5.1_val.json", {**head, "data": asked})
    if words:
        write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"dataset_type": "val", "data": read})


def pope(folder: Path, labels: Sequence[str]) -> None:
    """Questions 1, 2, … of each of POPE's files, with the same labels."""
    for kind in KINDS:
        lines = []
        for place, label in enumerate(labels):
            image = f"COCO_val2014_{place:012d}.jpg"
            text = f"Is there a {kind} thing in the image?"
            lines.append(json.dumps({"question_id": place + 1, "image": image, "text": text, "label": label}))
            picture(folder / "val2014" / image, 20 + place)
        write(folder / f"coco_pope_{kind}.json", "\n".join(lines) + "\n")
