"""Changed question files: JSONL for vtp-run --batch and vtp-calib, and the files of public VQA sets."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from mutate import Step, change_bytes, change_json, draw_bytes, draw_json
from subject import Subject, Wrong

from vtp.calib.data import load_samples
from vtp.calib.keep.journal import Answer, Journal
from vtp.runtime.commands.batch_file import read_lines

_LINES = [{"image": "a.jpg", "prompt": f"what is {word} ?", "answer": word} for word in ("red", "blue", "né")]
_FILES: dict[str, tuple[str, Any]] = {
    "jsonl": ("q.jsonl", _LINES),
    "batch": ("q.jsonl", [{**line, "image": ["a.jpg", "a.jpg"]} for line in _LINES]),
    "textvqa": ("q.json", {"data": [{"image_id": "a", "question": "what ?", "answers": ["x", "y"]}]}),
    "gqa": ("q.json", {"1": {"imageId": "a", "question": "what ?", "answer": "x"}}),
    "vqav2": (
        "q.json",
        {"data_subtype": "val", "questions": [{"image_id": 1, "question_id": 7, "question": "w ?"}]},
    ),
    "annotations": (
        "n.json",
        {"annotations": [{"question_id": 7, "answers": [{"answer": "x"}, {"answer": "y"}]}]},
    ),
    "journal": (
        "j.jsonl",
        [{"bundle": "b", "keep": 3, "question": "q", "text": "t", "tokens": [1], "ttft": 1.5}],
    ),
}


class Area:
    """Reads one changed file."""

    def __init__(self, subject: Subject, scratch: Path) -> None:
        self._folder = scratch / "questions"
        self._picture = Path(subject.picture)

    def draw(self, rng: random.Random) -> list[Step]:
        """[kind of file], then ["json", change...] or ["bytes", change...]."""
        kind = rng.choice(list(_FILES))
        content = _FILES[kind][1]
        steps: list[Step] = [[kind]]
        for _ in range(rng.choice([1, 1, 2])):
            if rng.random() < 0.7:
                steps.append(["json", *draw_json(rng, content)])
            else:
                steps.append(["bytes", *draw_bytes(rng, 150)])
        return steps

    def run(self, steps: list[Step]) -> None:
        """Raises VtpError for a file that is refused; what is read is text."""
        kind = steps[0][0]
        self._write(kind, steps[1:])
        path = self._folder / _FILES[kind][0]
        if kind == "batch":
            texts: list[Any] = [line.prompt for line in read_lines(path)]
        elif kind == "journal":
            journal = Journal(path)
            journal.add("b", 1, "q", Answer("t", [1], 1.0))
            journal.close()
            texts = []
        else:
            data = self._folder / ("q.json" if kind == "annotations" else path.name)
            samples = load_samples(data, annotations=self._folder / "n.json")
            texts = [text for sample in samples for text in (sample.prompt, sample.key, *sample.answers)]
        if not all(isinstance(text, str) and text.encode() is not None for text in texts):
            raise Wrong(f"{texts!r:.300}")

    def _write(self, kind: str, steps: list[Step]) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        for name in ("a.jpg", "COCO_val_000000000001.jpg"):
            (self._folder / name).write_bytes(self._picture.read_bytes())
        for other in ("annotations", "vqav2") if kind in ("annotations", "vqav2") else ():
            (self._folder / _FILES[other][0]).write_text(json.dumps(_FILES[other][1]))
        name, content = _FILES[kind]
        changes = [step[1:] for step in steps if step[0] == "json"]
        if name.endswith(".jsonl"):
            ours = [_within(changes, place) for place in range(len(content))]
            text = "\n".join(change_json(line, some) for line, some in zip(content, ours, strict=True)) + "\n"
        else:
            text = change_json(content, changes)
        data = text.encode("utf-8", "surrogatepass")
        (self._folder / name).write_bytes(
            change_bytes(data, [step[1:] for step in steps if step[0] == "bytes"])
        )


def _within(changes: list[Step], place: int) -> list[Step]:
    """The changes of one line of a JSONL file, whose paths begin with the line's number."""
    return [[kind, path[1:], *more] for kind, path, *more in changes if path[0] == place and len(path) > 1]
