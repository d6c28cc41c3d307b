"""The turns of pairs that an ended run has taken, so that the same command goes on from them."""

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


class KeptTurns:
    """A JSONL file: what was measured with, then a line for each pair as it is done.

    settings  what has to be the same for a pair to count; "time" is told and may differ
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Read what an ended run left; begin anew where it measured something else, or with other code."""
        self._file = file
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        head = json.loads(lines[0]) if lines else {}
        if not head or _without_time(head) != _without_time(settings):
            head, lines = dict(settings), [json.dumps(settings)]
        self.begun = str(head[_TIME])
        self.used = 0
        self._known = {_key(entry): entry for entry in map(json.loads, lines[1:])}
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as part:
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")  # without a line that was cut off

    def get(self, pair: Mapping[str, str]) -> Turns | None:
        """The turns of a pair, name -> what it is (see `identity`), the peer first; None: not taken yet."""
        entry = self._known.get(_key({"pair": list(pair.items())}))
        if entry is None:
            return None
        self.used += 1
        return Turns(entry["times"], entry["peaks"])

    def add(self, pair: Mapping[str, str], turns: Turns) -> None:
        """Write a pair's turns down."""
        entry = {"pair": list(pair.items()), "times": turns.times, "peaks": turns.peaks}
        self._known[_key(entry)] = json.loads(json.dumps(entry))
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")


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


def _key(entry: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, mark) for name, mark in entry["pair"])


def _without_time(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != _TIME}
