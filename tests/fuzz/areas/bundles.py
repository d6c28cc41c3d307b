"""Bundles whose manifest was changed, and whose files were cut, flipped, swapped or replaced.

With hashes compared, a bundle whose files were changed answers as before or not at all.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from mutate import Step, change_bytes, change_json, draw_bytes, draw_json, fresh_folder, put
from subject import Subject, Wrong

from vtp.runtime import Pipeline
from vtp.runtime.commands.doctor import main as doctor

from .commands import run_command

PROMPT = "what shape is the red ?"
_ODD = ("fifo", "folder", "link out", "loop", "missing", "empty", "other")


class Area:
    """Loads a changed bundle and asks it, or shows it to vtp-doctor."""

    def __init__(self, subject: Subject, scratch: Path) -> None:
        self._subject, self._scratch = subject, scratch
        self._names = sorted(path.name for path in Path(subject.bundle).iterdir())
        self._manifest = json.loads(Path(subject.bundle, "manifest.json").read_text(encoding="utf-8"))
        self._right = self._ask(Path(subject.bundle))

    def draw(self, rng: random.Random) -> list[Step]:
        """["manifest", change...], or ["bytes", file, change], or ["odd", file, what], then who looks."""
        steps: list[Step] = [[rng.choice(["ask", "ask", "ask", "doctor", "doctor --json"])]]
        kind = rng.choice(["manifest", "manifest", "manifest", "bytes", "odd"])
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            name = rng.choice(self._names)
            if kind == "manifest":
                steps.append([kind, *draw_json(rng, self._manifest)])
            elif kind == "bytes":
                steps.append([kind, name, *draw_bytes(rng, Path(self._subject.bundle, name).stat().st_size)])
            else:
                steps.append([kind, name, rng.choice(_ODD)])
        return steps

    def run(self, steps: list[Step]) -> None:
        """Raises VtpError where the bundle is refused."""
        folder = fresh_folder(self._scratch, Path(self._subject.bundle))
        look = next((step[0] for step in steps if len(step) == 1), "ask")
        changes = [step[1:] for step in steps if step[0] == "manifest"]
        if changes:
            text = change_json(self._manifest, changes)
            put(folder / "manifest.json", text.encode("utf-8", "surrogatepass"))
        for kind, *more in steps:
            if kind == "bytes":
                name, *step = more
                put(folder / name, change_bytes((folder / name).read_bytes(), [step]))
            elif kind == "odd":
                self._replace(folder / more[0], more[1])
        if look != "ask":
            run_command(doctor, [str(folder), *look.split()[1:]], is_json="--json" in look)
            return
        answer = self._ask(folder)
        if not changes and answer != self._right:
            raise Wrong(f"{answer} instead of {self._right}")

    def _ask(self, folder: Path) -> Any:
        with Pipeline.load(folder, "ort-cpu", threads=1, check_hashes=True) as pipe:
            result = pipe.generate(self._subject.picture, PROMPT, max_new_tokens=3)
            return result.token_ids, result.kept

    def _replace(self, path: Path, what: str) -> None:
        other = Path(self._subject.bundle, self._names[0])
        _remove(path)
        if what == "fifo":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        elif what == "loop":
            path.symlink_to(path.name)
        elif what == "link out":
            path.symlink_to(Path(self._subject.bundle, path.name))
        elif what == "empty":
            path.touch()
        elif what == "other":
            os.link(other, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
