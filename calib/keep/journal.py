"""Every answer is written down as it comes, so that a killed calibration goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from vtp.engines import VtpError
from vtp.engines.disk.locks import try_lock
from vtp.engines.errors import quoted
from vtp.engines.strict_json import parse_json
from vtp.runtime.bundle.folder import check_outside

_NUMBER = (int, float, type(None))
_KINDS: dict[str, Any] = {
    "bundle": str,
    "keep": int,
    "question": str,
    "text": str,
    "tokens": list,
    "ttft": _NUMBER,
}


@dataclass(frozen=True)
class Answer:
    """What a bundle answered: text, tokens, and ms to the first token (None: answered elsewhere)."""

    text: str
    tokens: list[int]
    ttft: float | None


class Journal:
    """An append-only JSONL file of answers by (bundle, keep-count, question); a later line counts.

    One run at a time writes to it: another one is refused before it reads anything.
    """

    def __init__(self, file: Path) -> None:
        """Open `file`, reading what an earlier run left; a line that a kill cut short is dropped."""
        self._answers: dict[tuple[str, int, str], Answer] = {}
        self._earlier: set[tuple[str, int, str]] = set()
        self._path = file
        check_outside(file)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = file.open("a", encoding="utf-8")
        except OSError as error:
            raise self._refused(error) from error
        try:
            self._read(file)
        except VtpError:
            self._file.close()
            raise
        self._earlier.update(self._answers)

    def _read(self, file: Path) -> None:
        if try_lock(self._file.fileno()) is False:
            raise VtpError(
                f"another vtp-calib is writing {file}; wait until it has ended, or choose another --out"
            )
        try:
            for entry in _entries(file):
                key = entry.pop("bundle"), entry.pop("keep"), entry.pop("question")
                self._answers[key] = Answer(**entry)
        except (OSError, VtpError) as error:
            raise VtpError(
                f"{file} is not a journal of vtp-calib: {error}; remove it or choose --out"
            ) from error

    def get(self, bundle: str, keep: int, question: str) -> Answer | None:
        """An answer that is known already."""
        return self._answers.get((bundle, keep, question))

    def is_earlier(self, bundle: str, keep: int, question: str) -> bool:
        """Whether an answer is an earlier run's, and its time with it."""
        return (bundle, keep, question) in self._earlier

    def add(self, bundle: str, keep: int, question: str, answer: Answer) -> None:
        """Write an answer down; it is on its way to the disk when this returns. VtpError on a full disk."""
        entry: dict[str, Any] = {"bundle": bundle, "keep": keep, "question": question, **asdict(answer)}
        try:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._refused(error) from error
        self._answers[bundle, keep, question] = answer
        self._earlier.discard((bundle, keep, question))

    def close(self) -> None:
        """Close the file, and let another run have it."""
        with suppress(OSError):  # what did not fit on the disk was said when it was added
            self._file.close()

    def _refused(self, error: OSError) -> VtpError:
        return VtpError(
            f"cannot write {self._path}: {error.strerror or error}; the answers that are there stay, and the "
            "same command goes on from them"
        )


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
        yield _entry(parse_json(line, "a line"))


def _entry(data: Any) -> dict[str, Any]:
    """A line of the journal. Raises VtpError for one that this vtp did not write."""
    fits = isinstance(data, dict) and set(data) == set(_KINDS)
    if not fits or not all(isinstance(data[name], kind) for name, kind in _KINDS.items()):
        raise VtpError(f"a line is {quoted(data, 100)}; it has {', '.join(_KINDS)}")
    if not all(isinstance(token, int) for token in data["tokens"]):
        raise VtpError(f"tokens are {quoted(data['tokens'], 100)}, not whole numbers")
    return data
