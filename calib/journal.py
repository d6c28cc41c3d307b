"""Every answer is written down as it comes, so that a killed calibration goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from vtp.engines import VtpError


@dataclass(frozen=True)
class Answer:
    """What a bundle answered: text, tokens, and ms to the first token (None: answered elsewhere)."""

    text: str
    tokens: list[int]
    ttft: float | None


class Journal:
    """An append-only JSONL file of answers by (bundle, keep-count, question); a later line counts."""

    def __init__(self, file: Path) -> None:
        """Open `file`, reading what an earlier run left; a line that a kill cut short is dropped."""
        self._answers: dict[tuple[str, int, str], Answer] = {}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            for entry in _entries(file):
                key = entry.pop("bundle"), entry.pop("keep"), entry.pop("question")
                self._answers[key] = Answer(**entry)
            self._file: IO[str] = file.open("a", encoding="utf-8")
        except (OSError, KeyError, TypeError) as error:
            raise VtpError(
                f"{file} is not a journal of vtp-calib: {error}; remove it or choose --out"
            ) from error

    def get(self, bundle: str, keep: int, question: str) -> Answer | None:
        """An answer that is known already."""
        return self._answers.get((bundle, keep, question))

    def add(self, bundle: str, keep: int, question: str, answer: Answer) -> None:
        """Write an answer down; it is on its way to the disk when this returns."""
        entry: dict[str, Any] = {"bundle": bundle, "keep": keep, "question": question, **asdict(answer)}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        self._answers[bundle, keep, question] = answer

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal; what follows the last line end is cut off the file."""
    if not file.exists():
        return
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with file.open("r+b") as torn:
            torn.truncate(whole)
    for line in data[:whole].splitlines():
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise KeyError(f"a line is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise KeyError("a line is no object")
        yield entry
