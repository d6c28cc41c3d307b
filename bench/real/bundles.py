"""One bundle a method, exported once: a run that was ended, or one on another set, takes what is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtp.engines import UsageError, VtpError
from vtp.engines.disk.files import free_disk
from vtp.engines.disk.whole import whole_file
from vtp.engines.strict_json import read_json
from vtp.engines.versions import own_version
from vtp.export.checkpoint.loading import model_name
from vtp.export.exporter import Request, export
from vtp.export.targets import TARGETS
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.machine.room import memory_room

NONE = "none"
_WHOLE = 4  # times a model's weights in memory are enough to hold it against torch as a whole
_BYTES = {"float32": 4, "float16": 2}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Exports:
    """How a model's bundles are made: fields of vtp-export's `Request`; `verify` may be "auto"."""

    model: Path
    work: Path
    target: str = "ort"
    dtype: str | None = None
    image_size: tuple[int, int] | None = None
    image_fit: str | None = None
    max_length: int | None = None
    verify: str = "auto"

    def unpruned(self, progress: Progress, note: Progress) -> Bundle:
        """The bundle that keeps every token."""
        return self._bundle(NONE, None, progress, note)

    def pruned(self, method: str, keeps: Sequence[int], progress: Progress, note: Progress) -> Bundle:
        """The bundle of a method with all its keep-counts."""
        return self._bundle(method, ",".join(map(str, sorted(keeps))), progress, note)

    def check_disk(self, methods: int) -> None:
        """Raise VtpError if the disk cannot hold that many bundles of the model: each holds all weights."""
        need, free = methods * self._bundle_bytes, free_disk(self.work)
        if need > free:
            raise VtpError(
                f"{methods} bundles of this model take about {need / 1e9:.1f} GB, and {self.work} has "
                f"{free / 1e9:.1f} GB free; free some space, or give --work a folder on another disk"
            )

    @property
    def _bundle_bytes(self) -> float:
        """Weights are mostly of 16 bits on the hub; a bundle holds them in its dtype."""
        weights = sum(file.stat().st_size for file in self.model.glob("*.safetensors"))
        return weights / 2 * _BYTES[self.dtype or TARGETS[self.target].dtype]

    @property
    def checked(self) -> str:
        """How a bundle is held against torch: as asked, else by layers if the whole may not fit in memory."""
        if self.verify != "auto":
            return self.verify
        room = memory_room()
        return "full" if room is None or _WHOLE * self._bundle_bytes < room.bytes else "layers"

    def _bundle(self, method: str, keeps: str | None, progress: Progress, note: Progress) -> Bundle:
        folder = self.work / "bundles" / _folder_name(method)
        request = Request(
            folder,
            str(self.model),
            method,
            keeps,
            target=self.target,
            dtype=self.dtype,
            max_length=self.max_length,
            image_size=self.image_size,
            image_fit=self.image_fit,
            verify=self.checked,
            overwrite=True,
        )
        known = folder.with_name(f"{folder.name}.json")
        stamp = self._stamp(request)
        made = _made(folder, known, stamp)
        if made is None:
            progress(f"{method}: export")
            made = export(request, lambda step: progress(f"{method}: {step}"), note=note)
            with whole_file(known) as part:
                part.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
        return made

    def _stamp(self, request: Request) -> dict[str, Any]:
        """What a bundle that is there was made from; another one is made if anything of it differs."""
        files = sorted(file for file in self.model.iterdir() if file.is_file())
        asked = (
            "method",
            "keep_tokens",
            "target",
            "dtype",
            "max_length",
            "image_size",
            "image_fit",
            "verify",
        )
        return {
            "vtp": own_version(),
            "model": [model_name(self.model), *([file.name, file.stat().st_size] for file in files)],
            **{name: _plain(getattr(request, name)) for name in asked},
        }


def kept_counts(asked: Sequence[int], count: int) -> list[int]:
    """The keep-counts that prune `count` tokens, largest first. UsageError if none does."""
    fitting = sorted({keep for keep in asked if keep < count}, reverse=True)
    if not fitting:
        least = min(asked)
        raise UsageError(f"--keep {least} prunes nothing of this model's {count} visual tokens; give fewer")
    return fitting


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _folder_name(method: str) -> str:
    """A folder's name for a method, which may be FILE.py:CLASS."""
    return "".join(letter if letter.isalnum() else "-" for letter in method).strip("-")


def _made(folder: Path, known: Path, stamp: dict[str, Any]) -> Bundle | None:
    """The bundle that is there, if it was made from just that."""
    try:
        return open_bundle(folder) if read_json(known) == stamp else None
    except VtpError:
        return None
