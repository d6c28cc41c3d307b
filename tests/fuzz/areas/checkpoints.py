"""Changed model folders: JSON files, the header of the weights, their bytes, files of odd kinds."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

from mutate import Step, change_bytes, change_json, draw_bytes, draw_json, fresh_folder, put
from subject import Subject

from vtp.export.checkpoint import loading as checkpoint

_WEIGHTS = "model.safetensors"


class Area:
    """Loads a changed folder as vtp-export does before it traces anything."""

    def __init__(self, subject: Subject, scratch: Path) -> None:
        from vtp.export.cli import quiet_libraries

        quiet_libraries()
        self._subject, self._scratch = subject, scratch
        folder = Path(subject.model)
        self._json = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        raw = (folder / _WEIGHTS).read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        self._header: dict[str, Any] = json.loads(raw[8 : 8 + size])
        self._names = sorted(path.name for path in folder.iterdir())
        checkpoint.load(folder, "float32", None, "letterbox", None)

    def draw(self, rng: random.Random) -> list[Step]:
        """["json", file, change], ["header", change], ["bytes", file, change], ["odd", file, what]."""
        steps: list[Step] = []
        for _ in range(rng.choice([1, 1, 2])):
            kind, name = (
                rng.choice(["json", "json", "json", "header", "bytes", "odd"]),
                rng.choice(self._names),
            )
            if kind == "json":
                name = rng.choice(list(self._json))
                steps.append([kind, name, *draw_json(rng, self._json[name])])
            elif kind == "header":
                steps.append([kind, *draw_json(rng, self._header)])
            elif kind == "bytes":
                steps.append([kind, name, *draw_bytes(rng, Path(self._subject.model, name).stat().st_size)])
            else:
                steps.append([kind, name, rng.choice(["missing", "empty", "folder", "fifo", "loop"])])
        return steps

    def run(self, steps: list[Step]) -> None:
        """Raises VtpError for a folder that is refused; any model will do, for it is another folder."""
        folder = fresh_folder(self._scratch, Path(self._subject.model))
        for kind, *more in steps:
            if kind == "header":
                self._change_header(folder / _WEIGHTS, [more])
                continue
            path, change = folder / more[0], more[1:]
            if kind == "odd":
                _replace(path, change[0])
            elif not path.is_file():
                continue
            elif kind == "json":
                put(path, change_json(self._json[more[0]], [change]).encode("utf-8", "surrogatepass"))
            else:
                put(path, change_bytes(path.read_bytes(), [change]))
        checkpoint.check(folder, None)
        checkpoint.load(folder, "float32", None, "letterbox", None)

    def _change_header(self, path: Path, changes: list[Step]) -> None:
        if not path.is_file():
            return
        raw = path.read_bytes()
        if len(raw) < 8:
            return
        size = struct.unpack("<Q", raw[:8])[0]
        header = change_json(self._header, changes).encode("utf-8", "surrogatepass")
        put(path, struct.pack("<Q", len(header)) + header + raw[8 + size :])


def _replace(path: Path, what: str) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    if what == "empty":
        path.touch()
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path.name)
