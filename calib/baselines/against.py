"""Does a method beat a random choice, or a bundle of another kind, at the same cost? One line each."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtp.calib import stats
from vtp.calib.baselines.random_choice import RandomExam, why_not
from vtp.calib.baselines.smaller import DOWNSAMPLE, SmallerPicture
from vtp.calib.keep.examiner import Examiner, score
from vtp.calib.keep.journal import Answer
from vtp.engines import UsageError
from vtp.engines.errors import shown
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.commands.console import say, warn
from vtp.runtime.hub.names import display_name

NONE = "none"


def against_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says what a method has to beat."""
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="BUNDLE|downsample|none",
        help="also hold the method against a smaller picture with as many tokens (downsample), which is "
        "exported first, or against a bundle; a random choice of tokens is asked anyway (none: nothing is)",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="what the bundle was made from, for --against downsample (default: the built-in model)",
    )


@dataclass(frozen=True)
class Beside:
    """A method at a keep-count and a baseline at the same cost or a lower one, on the same questions.

    method, baseline  what the two are called, in words
    own, other        their scores
    ahead             by how much the method is ahead of the baseline (paired)
    """

    method: str
    baseline: str
    own: stats.Estimate
    other: stats.Estimate
    ahead: stats.Estimate
    questions: int

    @property
    def beaten(self) -> bool:
        """Whether the whole 95 % interval of the difference lies above 0."""
        return self.ahead.low > 0

    @property
    def line(self) -> str:
        """Both figures, the difference with its interval, and the number of questions."""
        verb = "beats" if self.beaten else "does not beat"
        gap = f"{self.ahead.value:+.3f} ({self.ahead.low:+.3f} to {self.ahead.high:+.3f})"
        figures = f"{self.own.value:.3f} against {self.other.value:.3f}, {gap}"
        return f"{self.method} {verb} {self.baseline}: {figures}, {self.questions} questions"

    def to_json(self) -> dict[str, Any]:
        """What --json and the manifest say of it."""
        estimates = {"score": self.own, "baseline_score": self.other, "difference": self.ahead}
        named = {name: [one.value, one.low, one.high] for name, one in estimates.items()}
        return {"method": self.method, "baseline": self.baseline, **named, "beaten": self.beaten}


class Baselines:
    """What `--against` asks for, put to the questions of a method's examiner.

    notes     what could not be asked, a line each
    unpruned  answers with every token kept, for metric "agreement"
    """

    def __init__(
        self,
        wanted: Sequence[str],
        open_bundle: Callable[[str], Examiner],
        metric: str,
        smaller: SmallerPicture,
    ) -> None:
        """`open_bundle` gives the examiner of a bundle by its name, `smaller` a smaller picture's bundle.

        Raises UsageError or VtpError, before a question is asked, for a bundle that does not open.
        """
        if NONE in wanted and len(wanted) > 1:
            raise UsageError("--against none asks for no baseline; leave it out, or the others")
        if smaller.model is not None and DOWNSAMPLE not in wanted:
            raise UsageError("--model belongs to --against downsample; give both, or leave it out")
        self.notes: list[str] = []
        self._random = NONE not in wanted
        self._smaller = smaller if DOWNSAMPLE in wanted else None
        self._open = open_bundle
        self._bundles = [(text, open_bundle(text)) for text in wanted if text not in (NONE, DOWNSAMPLE)]
        self._pictures: dict[Path, Examiner] = {}
        self._metric = metric
        self.unpruned: Sequence[Answer] | None = None
        self._known: dict[str, list[float]] = {}

    @property
    def hint(self) -> str:
        """How to ask for the baseline that was not asked for; "" if none is missing."""
        if self._smaller or not self._random:
            return ""
        return "a smaller picture with as many tokens was not asked: --against downsample does"

    def check(self, manifest: Manifest) -> None:
        """Raise UsageError, before a question is asked, for a smaller picture that a bundle cannot have."""
        if self._smaller is not None and manifest.method.name != NONE:
            self._smaller.check(manifest)

    def beside(self, method: str, examiner: Examiner, keep: int, scores: Sequence[float]) -> list[Beside]:
        """The method's scores at a keep-count beside those of every baseline; none where nothing is dropped.

        Raises UsageError for a baseline of another model.
        """
        found: list[Beside] = []
        if keep >= examiner.bundle.manifest.visual.count:
            return found
        if self._random and (drawn := self._draw(method, examiner, keep)) is not None:
            found.append(_beside(method, f"a random choice of {keep} tokens", scores, drawn))
        if self._smaller is not None:
            found.append(self._against_picture(self._smaller, method, examiner, keep, scores))
        for text, other in self._bundles:
            _check_model(text, other.bundle.manifest, examiner.bundle.manifest)
            held = [count for count in other.bundle.manifest.visual.keep if count <= keep]
            if held:
                name = f"{display_name(text)}:{max(held)}"
                found.append(_beside(method, name, scores, self._scores(other, max(held))))
            else:
                self.notes.append(f"{_lacks(text, other)} more than {keep}; it is held against nothing here")
        return found

    def _against_picture(
        self, smaller: SmallerPicture, method: str, examiner: Examiner, keep: int, scores: Sequence[float]
    ) -> Beside:
        """Beside the whole picture at fewer pixels; its number of tokens is said, for it may be another."""
        own = examiner.bundle.manifest
        folder = smaller.bundle(own, keep)
        if folder not in self._pictures:
            self._pictures[folder] = self._open(str(folder))
        other = self._pictures[folder]
        seen = other.bundle.manifest
        height, width = seen.image.fixed_size
        name = f"a smaller picture of {width}x{height} pixels, {seen.visual.count} tokens"
        if own.quantization and not seen.quantization:
            self.notes.append(f"{method} is held against a smaller picture in full precision")
        return _beside(method, name, scores, self._scores(other, seen.visual.count))

    def _draw(self, method: str, examiner: Examiner, keep: int) -> list[float] | None:
        """Scores of a random choice; None where there is none. Bundles of one model share it."""
        manifest = examiner.bundle.manifest
        reason = why_not(manifest, keep)
        if reason is not None:
            if reason:
                self.notes.append(
                    f"{method} is held against no random choice: {reason}; give --against a bundle of "
                    f"vtp-export --method random --keep-tokens {keep}"
                )
            return None
        alike = _identity(manifest, keep)
        if alike not in self._known:
            self._known[alike] = self._scores(examiner.sitting(RandomExam, "random choice"), keep)
        return self._known[alike]

    def _scores(self, examiner: Examiner, keep: int) -> list[float]:
        return score(examiner.answers(keep), examiner.samples, self._metric, self.unpruned)


def report(
    besides: Sequence[Beside], notes: Iterable[str], name: str, quiet: bool = False, hint: str = ""
) -> None:
    """Say what was beaten, and warn of what was not; `quiet`: warnings alone, for standard output is JSON.

    hint  said last, unless it is quiet or nothing was compared
    """
    for one in besides:
        if not one.beaten:
            warn(name, one.line)
        elif not quiet:
            say(one.line)
    for line in notes:
        warn(name, line)
    if hint and besides and not quiet:
        say(hint)


def _beside(method: str, baseline: str, own: Sequence[float], other: Sequence[float]) -> Beside:
    ahead = stats.difference(own, other)
    return Beside(method, baseline, stats.mean(own), stats.mean(other), ahead, len(own))


def _check_model(text: str, other: Manifest, own: Manifest) -> None:
    """Refuse a bundle of another model: what it scores says nothing of a method."""
    one, two = ((part.model.architecture, part.model.hidden_size) for part in (other, own))
    if one != two:
        raise UsageError(
            f"--against {shown(text)} is a bundle of another model ({one[0]}, {one[1]} wide, not {two[0]}, "
            f"{two[1]} wide); give one of the same model"
        )


def _lacks(text: str, examiner: Examiner) -> str:
    least = min(examiner.bundle.manifest.visual.keep)
    return f"--against {shown(text)} keeps {least} tokens at least,"


def _identity(manifest: Manifest, keep: int) -> str:
    """What a random choice depends on: all of a bundle but its method."""
    parts = [
        dataclasses.asdict(manifest.model),
        dataclasses.asdict(manifest.tower) if manifest.tower else None,
        *(manifest.target, manifest.dtype, manifest.method.positions, manifest.quantization, keep),
    ]
    return json.dumps([*parts, repr(manifest.image)], sort_keys=True)
