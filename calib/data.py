"""Questions to calibrate on: a JSONL file beside its pictures, or the files of a public VQA set.

JSONL: one object a line, {"image": "path", "prompt": "...", "answer": "..." or ["...", ...]}; paths are
relative to the file. VQA sets come as one or two JSON files: VQAv2 (questions, annotations), GQA (questions
with their answers), TextVQA (data) and POPE (a question a line, in files that end in .json all the same).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from vtp.engines import UsageError
from vtp.engines.disk.files import is_file
from vtp.engines.errors import quoted, shown
from vtp.engines.strict_json import read_json, read_json_lines
from vtp.runtime.commands.batch_file import QUESTION_BYTES

_POPE = re.compile(r"pope_(random|popular|adversarial)\.json$")
FORMATS = ("auto", "jsonl", "vqav2", "gqa", "textvqa", "pope")


@dataclass(frozen=True)
class Sample:
    """One question. `answers` are the accepted ones (annotators' answers in VQA sets); empty: not known.

    kind  what the set tells questions apart by: "open" or "binary" (GQA), the negatives' sampling (POPE)
    """

    image: Path
    prompt: str
    answers: tuple[str, ...] = ()
    kind: str = ""

    @cached_property
    def key(self) -> str:
        """What tells this question from others, for the journal: a hash of the picture's bytes, of prompt and
        answers. A picture that was replaced under its name is another question, a moved one is not.

        Raises UsageError where the picture cannot be read.
        """
        text = json.dumps([picture_hash(self.image), self.prompt, self.answers])
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def picture_hash(image: Path) -> str:
    """sha256 of a picture's bytes; read again only if the file is another one, or was written to."""
    try:
        status = image.stat()
        return _hash(image, (status.st_ino, status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise UsageError(f"cannot read the picture {image}: {error.strerror or error}") from error


@cache
def _hash(image: Path, state: tuple[int, ...]) -> str:
    """`state` is part of the cache's key, and of nothing else."""
    digest = hashlib.sha256()
    with image.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_samples(
    data: Path, form: str = "auto", images: Path | None = None, annotations: Path | None = None
) -> list[Sample]:
    """Read the questions of a file.

    data         the JSONL file, or a VQA set's questions
    form         one of FORMATS; auto: by the ending and the keys
    images       folder of the pictures (default: the file's own)
    annotations  VQAv2's second file

    Raises UsageError, in one line that names the file and the place in it, for what cannot be read.
    """
    samples = read_questions(data, form, images, annotations)
    missing = next((sample.image for sample in samples if not is_file(sample.image)), None)
    if missing is not None:
        raise UsageError(
            f"data {data} names the picture {shown(missing)}, which does not exist; see --images"
        )
    return samples


def read_questions(
    data: Path, form: str = "auto", images: Path | None = None, annotations: Path | None = None
) -> list[Sample]:
    """The same as `load_samples`, whether or not the pictures are there yet."""
    if form not in FORMATS:
        raise UsageError(f"unknown data format '{form}'; choose one of {', '.join(FORMATS)}")
    if not is_file(data):
        raise UsageError(f"data {shown(data)} does not exist; give a JSONL file, one question a line")
    folder = images or data.parent
    if form == "jsonl" or (form == "auto" and data.suffix == ".jsonl"):
        samples = _jsonl(data, folder)
    elif form == "pope" or (form == "auto" and _POPE.search(data.name)):
        samples = _pope(data, folder)
    else:
        content = _json(data)
        kind = form if form != "auto" else _guess(data, content)
        samples = _READERS[kind](content, folder, annotations)
    if not samples:
        raise UsageError(f"data {shown(data)} holds no question")
    if len({bool(sample.answers) for sample in samples}) > 1:
        raise UsageError(f"data {data}: some questions have answers and some have none; give all or none")
    return samples


def _jsonl(file: Path, folder: Path) -> list[Sample]:
    read = read_json_lines(file, QUESTION_BYTES, UsageError)
    return [_line(item, where, folder) for where, item in read]


def _line(item: Any, where: str, folder: Path) -> Sample:
    if not isinstance(item, dict) or not isinstance(item.get("image"), str):
        raise UsageError(f'{where} has no "image"; a line is {{"image": ..., "prompt": ..., "answer": ...}}')
    if not isinstance(item.get("prompt"), str):
        raise UsageError(f'{where} has no "prompt", a string')
    answer = item.get("answer", [])
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not all(isinstance(one, str) for one in answers):
        raise UsageError(f'{where}: "answer" is neither a string nor a list of strings')
    return Sample(folder / item["image"], item["prompt"], tuple(answers))


def _pope(file: Path, folder: Path) -> list[Sample]:
    found = _POPE.search(file.name)
    kind = found[1] if found else ""
    return [
        _polled(item, where, folder, kind)
        for where, item in read_json_lines(file, QUESTION_BYTES, UsageError)
    ]


def _polled(item: Any, where: str, folder: Path, kind: str) -> Sample:
    fields = [item.get(key, "") for key in ("image", "text", "label")] if isinstance(item, dict) else [""] * 3
    image, text, label = [one if isinstance(one, str) else "" for one in fields]
    if not (image and text and label in ("yes", "no")):
        raise UsageError(
            f'{where} is not a line of POPE; one is {{"image": ..., "text": ..., "label": "yes" or "no"}}'
        )
    return Sample(folder / image, text, (label,), kind)


def _json(file: Path) -> Any:
    return read_json(file, QUESTION_BYTES, UsageError, cure="a JSONL file ends in .jsonl")


def _guess(file: Path, content: Any) -> str:
    if isinstance(content, dict):
        if isinstance(content.get("questions"), list):
            return "vqav2"
        if isinstance(content.get("data"), list):
            return "textvqa"
        if content and all(isinstance(item, dict) and "imageId" in item for item in content.values()):
            return "gqa"
    raise UsageError(f"data {file} has an unknown format; give --format, one of {', '.join(FORMATS[1:])}")


def _vqav2(content: Any, folder: Path, annotations: Path | None) -> list[Sample]:
    """Questions beside annotations; pictures are named COCO_<split>_<12 digits>.jpg."""
    if annotations is None:
        raise UsageError("VQAv2 keeps its answers in a second file; give it with --annotations")
    found = _fields(_json(annotations), "annotations")
    answers = {item["question_id"]: [one["answer"] for one in _list(item["answers"])] for item in found}
    split = content.get("data_subtype", "val2014")
    samples = []
    for item in _fields(content, "questions"):
        name = f"COCO_{split}_{item['image_id']:012d}.jpg"
        if item["question_id"] not in answers:
            raise UsageError(f"{annotations} has no answers to question {item['question_id']}")
        samples.append(Sample(folder / name, item["question"], tuple(answers[item["question_id"]])))
    return samples


def _gqa(content: Any, folder: Path, _: Path | None) -> list[Sample]:
    return [
        Sample(folder / f"{item['imageId']}.jpg", item["question"], (item["answer"],), _structure(item))
        for item in content.values()
    ]


def _structure(item: Mapping[str, Any]) -> str:
    """Whether a question of GQA is open or answered by one of two, as its evaluation tells them apart."""
    structural = item.get("types", {}).get("structural")
    return "" if structural is None else "open" if structural == "query" else "binary"


def _textvqa(content: Any, folder: Path, _: Path | None) -> list[Sample]:
    return [
        Sample(folder / f"{item['image_id']}.jpg", item["question"], tuple(_list(item.get("answers", []))))
        for item in _fields(content, "data")
    ]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"answers: {quoted(value)} is not a list")
    return value


def _fields(content: Any, key: str) -> list[Mapping[str, Any]]:
    items = content.get(key) if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise UsageError(f"this is not a valid file of that format: it has no list '{key}'")
    return items


def _is_text(sample: Sample) -> bool:
    return all(isinstance(text, str) for text in (sample.prompt, *sample.answers))


def _checked(reader: Callable[..., list[Sample]]) -> Callable[..., list[Sample]]:
    def read(content: Any, folder: Path, annotations: Path | None) -> list[Sample]:
        """The samples of a file's `content`; pictures lie in `folder`.

        Raises UsageError in one line that names the format, if an entry lacks something.
        """
        try:
            samples = reader(content, folder, annotations)
            wrong = next((sample for sample in samples if not _is_text(sample)), None)
            if wrong is not None:
                raise TypeError(f"the question {quoted(wrong.prompt)} or one of its answers is not text")
            return samples
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            name = reader.__name__.strip("_")
            raise UsageError(
                f"this is not a valid {name} file: {shown(error)} is missing or wrong in an entry"
            ) from error

    return read


_READERS = {"vqav2": _checked(_vqav2), "gqa": _checked(_gqa), "textvqa": _checked(_textvqa)}
