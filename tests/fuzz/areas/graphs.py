"""Graph files of a stranger: bytes of the protobuf changed, and the manifest made to fit."""

from __future__ import annotations

import json
import random
from pathlib import Path

from mutate import Step, change_bytes, draw_bytes, fresh_folder, put
from subject import Subject

from vtp.engines.disk.files import sha256
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.memory import bundle_memory


class Area:
    """Loads a bundle with a changed graph and asks it, after vtp-doctor's look at its memory."""

    engine = "ort-cpu"

    def __init__(self, subject: Subject, scratch: Path) -> None:
        self._subject, self._scratch = subject, scratch
        files = sorted(Path(subject.bundle).glob("*.onnx"))
        self._sizes = {path.name: path.stat().st_size for path in files}

    def draw(self, rng: random.Random) -> list[Step]:
        """Changes of one file's bytes."""
        name = rng.choice(list(self._sizes))
        return [[name, *draw_bytes(rng, self._sizes[name])] for _ in range(rng.choice([1, 1, 2, 4]))]

    def run(self, steps: list[Step]) -> None:
        """Raises VtpError where the graph is refused; any answer will do, for it is another graph."""
        folder = fresh_folder(self._scratch, Path(self._subject.bundle))
        for name, *step in steps:
            put(folder / name, change_bytes((folder / name).read_bytes(), [step]))
        self._fit_manifest(folder, {step[0] for step in steps})
        bundle_memory(open_bundle(folder), self.engine)
        with Pipeline.load(folder, self.engine, threads=1, check_hashes=True) as pipe:
            pipe.generate(self._subject.picture, "what shape is the red ?", max_new_tokens=2)

    def _fit_manifest(self, folder: Path, names: set[str]) -> None:
        path = folder / "manifest.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        for name in names:
            file = folder / name
            data["files"][name] = {"sha256": sha256(file), "bytes": file.stat().st_size}
        put(path, json.dumps(data).encode())
