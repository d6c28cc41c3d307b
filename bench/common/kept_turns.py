"""What an ended run of a benchmark has measured, so that the same command goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from vtp.bench.common.pairs import Times
from vtp.engines.disk.whole import whole_file

_TIME = "time"  # of the settings: when the first of a file's pairs began, which may differ


@dataclass(frozen=True)
class Turns:
    """What two took: name -> what -> milliseconds turn by turn, and name -> peak bytes of memory."""

    times: Times
    peaks: Mapping[str, int]


class KeptLines:
    """A JSONL file of a run that may be ended: its settings, then a line for each thing as it is done.

    head      the settings that the file begins with
    entries   what was done, by this run or by an ended one with the same settings
    """

    def __init__(self, file: Path, settings: Mapping[str, Any], may_differ: str = "") -> None:
        """Read what an ended run left; begin anew where its settings differ in more than `may_differ`."""
        self._file = file
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        head = json.loads(lines[0]) if lines else {}
        if not head or _without(head, may_differ) != _without(settings, may_differ):
            head, lines = dict(settings), [json.dumps(settings)]
        self.head: dict[str, Any] = head
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines[1:]]
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as part:
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")  # without a line that was cut off

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write an entry down; what was done is then as a later run will read it."""
        line = json.dumps(entry)
        self.entries.append(json.loads(line))
        with self._file.open("a", encoding="utf-8") as out:
            out.write(line + "\n")


class KeptTurns:
    """Turns in `KeptLines`, a line for each pair.

    settings  what has to be the same for a pair to count; "time" is told and may differ
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Read what an ended run left, if it measured the same with the same code."""
        self._lines = KeptLines(file, settings, may_differ=_TIME)
        self.begun = str(self._lines.head[_TIME])
        self.used = 0

    def get(self, pair: Mapping[str, str]) -> Turns | None:
        """The turns of a pair, name -> what it is (see `identity`), the peer first; None: not taken yet."""
        wanted = list(map(list, pair.items()))
        for entry in reversed(self._lines.entries):
            if entry["pair"] == wanted:
                self.used += 1
                return Turns(entry["times"], entry["peaks"])
        return None

    def add(self, pair: Mapping[str, str], turns: Turns) -> None:
        """Write a pair's turns down."""
        self._lines.add({"pair": list(pair.items()), "times": turns.times, "peaks": turns.peaks})


def identity(bundle: Path | None) -> str:
    """What tells one of vtp's bundles from another of the same name; "" for a peer."""
    return "" if bundle is None else hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()


def code(*modules: ModuleType) -> str:
    """A digest of the code in the folders of some modules, and below: of what answers, and of what asks."""
    digest = hashlib.sha256()
    for module in modules:
        folder = Path(str(module.__file__)).resolve().parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def _without(settings: Mapping[str, Any], left_out: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != left_out}
