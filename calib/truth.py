"""Answers of another model as the truth: of a larger one, or of the unpruned one.

A JSONL file: {"image": "path", "prompt": "...", "answer": "..."} a line, in any order; or, without "image"
and "prompt", one line for each question of the data, in its order, as `vtp-run BUNDLE --batch DATA` prints
them. The answer stands under "answer", or under "text" as in vtp-run's output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtp.calib.data import Sample
from vtp.calib.metrics import normalize
from vtp.engines import UsageError
from vtp.engines.disk.files import is_file
from vtp.engines.errors import shown
from vtp.engines.strict_json import read_json_lines
from vtp.runtime.commands.batch_file import QUESTION_BYTES

_Key = tuple[str, str]  # name of the picture's file, prompt


def with_truth(samples: Sequence[Sample], file: Path) -> list[Sample]:
    """The same questions, each with the one answer that the file gives.

    Raises UsageError, in one line, for a file that cannot be read or lacks a question's answer.
    """
    if not is_file(file):
        raise UsageError(f"--truth {shown(file)} does not exist; give a JSONL file, an answer a line")
    lines = list(read_json_lines(file, QUESTION_BYTES, UsageError))
    named = {_has_names(item) for _, item in lines}
    if len(named) > 1:
        raise UsageError(f'--truth {shown(file)}: some lines have "image" and "prompt" and some have none')
    answers = _by_name(lines, samples, file) if named == {True} else _in_order(lines, samples, file)
    return [dataclasses.replace(one, answers=(text,)) for one, text in zip(samples, answers, strict=True)]


def has_number(answer: str) -> bool:
    """Whether an answer holds a number, as digits or as a small number's word ("two", "none")."""
    return any(letter.isdigit() for letter in normalize(answer))


def _has_names(item: Any) -> bool:
    return isinstance(item, dict) and "image" in item and "prompt" in item


def _by_name(lines: Sequence[tuple[str, Any]], samples: Sequence[Sample], file: Path) -> list[str]:
    found: dict[_Key, str] = {}
    for where, item in lines:
        image, prompt = item["image"], item["prompt"]
        if not (isinstance(image, str) and isinstance(prompt, str)):
            raise UsageError(f'{where}: "image" and "prompt" must be text')
        key, text = (Path(image).name, prompt), _answer(where, item)
        if found.setdefault(key, text) != text:
            raise UsageError(f"{where} gives another answer to a question that has one: {shown(prompt, 80)}")
    keys = [(sample.image.name, sample.prompt) for sample in samples]
    lacking = next((key for key in keys if key not in found), None)
    if lacking is not None:
        raise UsageError(
            f"--truth {shown(file)} has no answer to '{shown(lacking[1], 80)}' about {shown(lacking[0])}"
        )
    return [found[key] for key in keys]


def _in_order(lines: Sequence[tuple[str, Any]], samples: Sequence[Sample], file: Path) -> list[str]:
    if len(lines) < len(samples):
        raise UsageError(
            f"--truth {shown(file)} has {len(lines)} answers, and there are {len(samples)} questions; give "
            '"image" and "prompt" with each answer, or one answer for each question, in their order'
        )
    return [_answer(where, item) for where, item in lines[: len(samples)]]


def _answer(where: str, item: Any) -> str:
    text = item.get("answer", item.get("text")) if isinstance(item, dict) else None
    if not isinstance(text, str):
        raise UsageError(f'{where} has no "answer" (or "text"), a string')
    return text.strip()
