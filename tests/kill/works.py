"""What writes, each in a place of its own: how it starts, what it does, what may be there afterwards."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from pathlib import Path

from vtp.calib.keep.journal import Answer, Journal
from vtp.engines.disk import whole
from vtp.runtime.bundle.folder import MANIFEST, open_bundle, set_calibration, whole_bundle
from vtp.runtime.triton.repository import write_repository


class Work(ABC):
    """One kind of writing in `place`; `bundles` are two whole bundles that differ in every graph.

    `bad` says what is wrong with what is there, or nothing; `left` what lies there that should not.
    """

    def __init__(self, place: Path, bundles: tuple[Path, Path]) -> None:
        self.place, self.bundles = place, bundles
        self.target = place / "target"
        self._turn = 0

    def prepare(self) -> None:
        """Make the place as it is before the writing."""
        self.place.mkdir(exist_ok=True)

    @abstractmethod
    def write(self) -> None:
        """Write, whole or not at all."""

    @abstractmethod
    def bad(self) -> str:
        """What is wrong with what is there; "" for nothing."""

    def left(self) -> list[str]:
        """Names beside the target."""
        return sorted(path.name for path in self.place.iterdir() if path != self.target)


class Overwrite(Work):
    """A bundle takes the place of another, in one step of the kernel."""

    def prepare(self) -> None:
        """The old bundle is there; what the last moment wrote is the old one of the next."""
        super().prepare()
        self._turn += 1
        if not self.target.exists():
            _copy(self.bundles[0], self.target)

    def write(self) -> None:
        """The other one, file by file."""
        _copy(self.bundles[self._turn % 2], self.target)

    def bad(self) -> str:
        """Either bundle, whole to the last byte."""
        found = open_bundle(self.target, check_hashes=True).manifest.to_json()
        known = [open_bundle(bundle).manifest.to_json() for bundle in self.bundles]
        return "" if found in known else "a mixture of two bundles"


class TwoRenames(Overwrite):
    """The same where the kernel or the disk cannot exchange folders."""

    def write(self) -> None:
        """Without the kernel's step."""
        step, whole.exchange = whole.exchange, lambda one, other: False
        try:
            super().write()
        finally:
            whole.exchange = step


class New(Work):
    """A bundle where there is none."""

    def prepare(self) -> None:
        """Nothing is there."""
        super().prepare()
        shutil.rmtree(self.target, ignore_errors=True)

    def write(self) -> None:
        """A bundle."""
        _copy(self.bundles[0], self.target)

    def bad(self) -> str:
        """Nothing, or all of it."""
        if self.target.exists():
            open_bundle(self.target, check_hashes=True)
        return ""


class Keep(Work):
    """vtp-calib keep writes a new manifest into a bundle that is there."""

    def prepare(self) -> None:
        """A bundle."""
        super().prepare()
        if not self.target.exists():
            _copy(self.bundles[0], self.target)
        self._before = open_bundle(self.target).manifest
        self._turn += 1

    def write(self) -> None:
        """Another default, and how it was found."""
        keeps = self._before.visual.keep
        set_calibration(self.target, keeps[self._turn % len(keeps)], {"turn": self._turn})

    def bad(self) -> str:
        """The old calibration or the new one; every file is one of the manifest's."""
        manifest = open_bundle(self.target, check_hashes=True).manifest
        stray = {path.name for path in self.target.iterdir()} - {MANIFEST, *manifest.files}
        known = manifest.calibration in ({"turn": self._turn}, self._before.calibration)
        return f"files in the bundle that it does not know: {stray}" if stray else "" if known else "lost"


class Triton(Work):
    """A model repository, most of it links to the bundle's files."""

    def prepare(self) -> None:
        """Nothing is there."""
        super().prepare()
        shutil.rmtree(self.target, ignore_errors=True)

    def write(self) -> None:
        """The repository."""
        write_repository(open_bundle(self.bundles[0]), self.target)

    def bad(self) -> str:
        """Nothing, or all of it: its last file is the copy of the bundle."""
        if self.target.exists():
            open_bundle(self.target / "vtp" / "1" / "bundle", check_hashes=True)
        return ""


class Notes(Work):
    """A calibration writes its answers down, one after the other."""

    def prepare(self) -> None:
        """A journal with one answer, which is never lost."""
        super().prepare()
        self.target = self.place / "answers.jsonl"
        self.target.unlink(missing_ok=True)
        self._add("first")

    def write(self) -> None:
        """Three more."""
        self._add("a", "b", "c")

    def bad(self) -> str:
        """The first answer, and the first N of the others."""
        journal = Journal(self.target)
        journal.close()
        held = [json.loads(line)["question"] for line in self.target.read_text().splitlines()]
        return "" if held == ["first", "a", "b", "c"][: max(1, len(held))] else f"it holds {held}"

    def _add(self, *names: str) -> None:
        journal = Journal(self.target)
        try:
            for name in names:
                journal.add("bundle", 1, name, Answer(name, [1, 2, 3], 1.0))
        finally:
            journal.close()


WORKS: dict[str, type[Work]] = {
    "overwrite": Overwrite,
    "two renames": TwoRenames,
    "new": New,
    "keep": Keep,
    "triton": Triton,
    "journal": Notes,
}


def _copy(source: Path, target: Path) -> None:
    with whole_bundle(target, overwrite=True) as aside:
        for file in source.iterdir():
            shutil.copyfile(file, aside / file.name)
