"""What is fuzzed: a tiny model's folder, a bundle exported from it, and a picture."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Wrong(Exception):
    """An answer that is not what it should be."""


@dataclass(frozen=True)
class Subject:
    """Folders and files that every area starts from; none is ever written to."""

    bundle: str
    model: str
    picture: str

    def to_json(self) -> str:
        """For a worker's command line."""
        return json.dumps(asdict(self))


def make(folder: Path) -> Subject:
    """The subject in `folder`, made where it is not there yet (in half a minute: torch exports it)."""
    subject = Subject(str(folder / "bundle"), str(folder / "model"), str(folder / "picture.png"))
    if not (folder / "bundle/manifest.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write(subject)
    return subject


def _write(subject: Subject) -> None:
    import numpy as np
    from PIL import Image

    from vtp.export.exporter import Request, export

    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(subject.picture)
    _tiny().save_tiny(Path(subject.model), layers=3)
    wishes: dict[str, Any] = {"method": "vispruner", "keep_tokens": "3,6", "max_length": 128}
    export(Request(Path(subject.bundle), model=subject.model, verify="none", overwrite=True, **wishes))


def _tiny() -> Any:
    """tests/models/tiny.py, by its path: tests are no package."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests/models/tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)
