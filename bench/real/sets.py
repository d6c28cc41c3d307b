"""The public sets: their files as their authors give them out, how a question is asked, how it is judged.

Prompts are those of LLaVA-1.5's own evaluation, whose figures the papers compare with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.real import pope
from vtp.calib.data import Sample, read_questions
from vtp.engines import UsageError
from vtp.engines.disk.files import is_file
from vtp.engines.errors import shown
from vtp.engines.strict_json import read_json, read_json_lines
from vtp.runtime.commands.batch_file import QUESTION_BYTES

LLAVA_PROMPTS = "llava_textvqa_val_v051_ocr.jsonl"  # in the eval.zip of LLaVA's docs/Evaluation.md
INSTRUCTION = "Answer the question using a single word or phrase."

# scores [questions] and question numbers [draws, n] -> a figure from 0 to 1 for each draw.
Figure = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Remote:
    """A file to fetch: `url` itself, or what lies under its own name in the zip archive there."""

    name: str
    url: str


@dataclass(frozen=True)
class PublicSet:
    """A set of questions.

    files     of questions, each read by itself
    pictures  the archive that holds them, and the folder that they lie in
    more      a file beside the questions that they do without, but papers' figures do not
    score     what the set's figure is called
    """

    name: str
    title: str
    metric: str
    score: str
    files: tuple[Remote, ...]
    pictures: Remote
    more: tuple[Remote, ...] = ()

    def read(self, folder: Path, limit: int | None) -> list[Sample]:
        """The first `limit` questions of each file, as they are put to a model; pictures may be missing yet.

        Raises UsageError, in one line, for files that are missing or broken.
        """
        return [sample for file in self.files for sample in self._read(folder, folder / file.name, limit)]

    def _read(self, folder: Path, file: Path, limit: int | None) -> list[Sample]:
        if not is_file(file):
            raise UsageError(f"{shown(file)} does not exist; {self.layout}")
        found = read_questions(file, self.name, folder / self.pictures.name)[:limit]
        hints, given = self._hints(folder), _given(folder / LLAVA_PROMPTS) if self.more else {}
        prompts = [
            given.get((one.image.stem, one.prompt.lower())) or asked(one.prompt, hints.get(one.image.stem))
            for one in found
        ]
        return [dataclasses.replace(one, prompt=text) for one, text in zip(found, prompts, strict=True)]

    def _hints(self, folder: Path) -> Mapping[str, Sequence[str]]:
        """The words that an OCR read in each picture, where that file is there."""
        files = [folder / one.name for one in self.more if is_file(folder / one.name)]
        return _words(files[0]) if files else {}

    def check(self, folder: Path, samples: Sequence[Sample]) -> None:
        """Raise UsageError for the first picture that is not there."""
        missing = next((one.image for one in samples if not is_file(one.image)), None)
        if missing is not None:
            raise UsageError(f"the picture {shown(missing)} does not exist; {self.layout}")

    def is_hinted(self, folder: Path) -> bool:
        """Whether the prompts name the words that an OCR read."""
        return bool(self._hints(folder)) or (bool(self.more) and is_file(folder / LLAVA_PROMPTS))

    @property
    def layout(self) -> str:
        """What a folder of the set holds, in words."""
        names = ", ".join(one.name for one in (*self.files, *self.more))
        return f"a folder of {self.name} holds {names} and the pictures in {self.pictures.name}/"

    def figure(self, samples: Sequence[Sample]) -> Figure:
        """What the set's authors report of questions with given scores: accuracy, of POPE the mean F1."""
        return pope.mean_f1(samples) if self.metric == "pope" else lambda scores, draws: scores[draws].mean(1)


def asked(question: str, words: Sequence[str] | None = None) -> str:
    """The prompt of a question. `words`: those that an OCR read in its picture; None: they are not told."""
    hint = "" if words is None else f"Reference OCR token: {', '.join(words)}\n"
    return f"{question}\n{hint}{INSTRUCTION}"


def _words(file: Path) -> dict[str, list[str]]:
    content = read_json(file, QUESTION_BYTES, UsageError)
    items = content.get("data") if isinstance(content, dict) else None
    if not isinstance(items, list) or not all(map(_is_read, items)):
        raise UsageError(
            f'{shown(file)} is not a file of OCR words; one is {{"data": [{{"image_id": ..., "ocr_tokens": '
            "[...]}, ...]}"
        )
    return {item["image_id"]: item["ocr_tokens"] for item in items}


def _given(file: Path) -> dict[tuple[str, str], str]:
    """Prompts of LLaVA's own question file by picture and question, where it is there.

    A prompt is the question, "Reference OCR token: …" (before or after it) and the instruction, a line each.
    """
    if not is_file(file):
        return {}
    prompts = {}
    for where, item in read_json_lines(file, QUESTION_BYTES, UsageError):
        picture, text = (
            (item.get("question_id"), item.get("text")) if isinstance(item, dict) else (None, None)
        )
        if not (isinstance(picture, str) and isinstance(text, str) and text):
            raise UsageError(
                f'{where} is not a question of LLaVA; one is {{"question_id": ..., "text": ...}}'
            )
        lines = text.split("\n")
        question = lines[1] if lines[0].startswith("Reference OCR token:") and lines[1:] else lines[0]
        prompts[picture, question.lower()] = text
    return prompts


def _is_read(item: Any) -> bool:
    words = item.get("ocr_tokens") if isinstance(item, dict) else None
    return (
        isinstance(words, list)
        and all(isinstance(word, str) for word in words)
        and isinstance(item.get("image_id"), str)
    )


_GQA = "https://downloads.cs.stanford.edu/nlp/data/gqa"
_TEXTVQA = "https://dl.fbaipublicfiles.com/textvqa"
_POPE = "https://raw.githubusercontent.com/RUCAIBox/POPE/main/output/coco"

SETS = {
    one.name: one
    for one in (
        PublicSet(
            "gqa",
            "GQA, testdev-balanced",
            "gqa",
            "accuracy",
            (Remote("testdev_balanced_questions.json", f"{_GQA}/questions1.2.zip"),),
            Remote("images", f"{_GQA}/images.zip"),
        ),
        PublicSet(
            "textvqa",
            "TextVQA, validation",
            "vqa",
            "soft accuracy",
            (Remote("TextVQA_0.5.1_val.json", f"{_TEXTVQA}/data/TextVQA_0.5.1_val.json"),),
            Remote("train_images", f"{_TEXTVQA}/images/train_val_images.zip"),
            (
                Remote(
                    "TextVQA_Rosetta_OCR_v0.2_val.json",
                    f"{_TEXTVQA}/data/TextVQA_Rosetta_OCR_v0.2_val.json",
                ),
            ),
        ),
        PublicSet(
            "pope",
            "POPE, COCO val2014",
            "pope",
            "mean F1",
            tuple(Remote(f"coco_pope_{kind}.json", f"{_POPE}/coco_pope_{kind}.json") for kind in pope.KINDS),
            Remote("val2014", "http://images.cocodataset.org/zips/val2014.zip"),
        ),
    )
}
