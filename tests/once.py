"""What is made once a run, whichever test process asks for it first: model folders and bundles on disk."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Once:
    """Folders below `root`, which every worker of a run sees. Read only: copy one before changing it."""

    root: Path

    def folder(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The folder `name`: `make` fills it at the first call, and other processes wait for that."""
        folder, part = self.root / name, self.root / f"{name}.part"
        with _locked(self.root / f"{name}.lock"):
            if not folder.exists():
                shutil.rmtree(part, ignore_errors=True)
                make(part)
                part.rename(folder)
        return folder

    def bundle(self, model: Path, **wishes: Any) -> Path:
        """The bundle of a model folder, by fields of vtp.export.exporter's Request."""
        from vtp.export.exporter import Request, export

        name = self.name(model.name, str(wishes["method"]), folder=str(model), **wishes)
        return self.folder(name, lambda part: export(Request(part, model=str(model), **wishes)))

    @staticmethod
    def name(*words: str, **options: Any) -> str:
        """A folder's name for what is asked: its words, and a hash of them with the options."""
        asked = repr((words, sorted(options.items())))
        return "-".join(
            [*(Path(word).name for word in words), hashlib.sha256(asked.encode()).hexdigest()[:12]]
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with `path` among processes; the system lets go of it when its holder ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
