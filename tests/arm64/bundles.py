"""What is asked: bundles of the built-in model, by method, target and kind of weights, and second cuts."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtp.calib.data import Sample
from vtp.calib.quantize.quantizer import Quantizer, Wish
from vtp.export.exporter import Request, export
from vtp.export.pruners import picture_methods
from vtp.runtime.bundle.folder import MANIFEST, open_bundle, whole_bundle
from vtp.scenes.exam import Item, by_picture, held_out

from .environment import ROOT

KEEP, CALIBRATED_ON = 64, 4
TARGETS = ("ort", "jetpack6")
WEIGHTS = {  # what vision encoder and projector, then the decoder become; None: exported so
    "float32": None,
    "float16": None,
    "int8": Wish("int8", "none"),
    "int4": Wish("none", "int4"),
    "prompt8": Wish("int8", "int4", prompt="int8"),  # two decoder graphs on one cache
}
UNSERVED = {("jetpack6", "int4"), ("jetpack6", "prompt8")}  # which TensorRT 10.3 does not have
PROMPT8 = ("none", "vispruner", "adaptprune", "fastv")  # of the others' decoders it is the same graph
THEN = {"vscan": "pyramiddrop:3", "apet": "apet:3"}  # a second cut inside the decoder, in float32
# These are asked by the scheduler and the watcher, too. The scheduler's answers are sampled, so that logits
# must be float32's: those of other weights are farther apart than draws are from another token.
STREAMED = ("vispruner-ort-float32", "adaptprune-jetpack6-float32")
QUICK = ("vispruner-ort-float32", "adaptprune-ort-float32")
_SOURCES = ("engines", "runtime", "export", "calib/quantize", "scenes/model")


@dataclass(frozen=True)
class Case:
    """One bundle; `then` names a second cut inside the decoder."""

    method: str
    target: str
    weights: str
    then: str = ""

    @property
    def name(self) -> str:
        second = self.then.partition(":")[0]
        return f"{self.method}{second and '+'}{second}-{self.target}-{self.weights}"

    def make(self, folder: Path) -> Path:
        """The bundle in `folder`, made anew unless it was made from these very sources."""
        bundle, stamp = folder / self.name, folder / f"{self.name}.sources"
        sources = digest(ROOT / one for one in _SOURCES)
        if stamp.is_file() and stamp.read_text() == sources and (bundle / MANIFEST).is_file():
            return bundle
        stamp.unlink(missing_ok=True)
        self._make(folder, bundle)
        stamp.write_text(sources)
        print(f"made   {self.name}", flush=True)
        return bundle

    def _make(self, folder: Path, bundle: Path) -> None:
        wish = WEIGHTS[self.weights]
        if wish is not None:
            quantize(Case(self.method, self.target, "float32").make(folder), bundle, wish)
            return
        keep = None if self.method == "none" else str(KEEP)
        wishes = {"keep_tokens": keep, "target": self.target, "dtype": self.weights, "verify": "none"}
        export(Request(bundle, method=self.method, then=self.then or None, overwrite=True, **wishes))


def quantize(source: Path, bundle: Path, wish: Wish) -> None:
    """What vtp-calib quantize writes, without its measurements."""
    pictures = save_pictures(bundle.parent / "calibration")
    samples = [Sample(path, item.prompt) for path, item in pictures]
    quantizer = Quantizer(open_bundle(source), wish)
    with whole_bundle(bundle, True) as aside:
        quantizer.observe(aside / "probe", samples, "ort-cpu", 1, lambda line: None)
        quantizer.write(aside, set())


def save_pictures(folder: Path, count: int = CALIBRATED_ON) -> list[tuple[Path, Item]]:
    """Questions of the exam about `count` pictures, and the pictures' files; every second one is oblong."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for at, items in enumerate(itertools.islice(by_picture(held_out()), count)):
        image, path = items[0].image, folder / f"{at}.png"
        (image.resize((500, 375)) if at % 2 else image).save(path)
        saved.append((path, items[at % len(items)]))
    return saved


def cases() -> list[Case]:
    """All, float32 on ONNX Runtime first, but for UNSERVED; those of THEN last."""
    plain = [
        Case(method, target, weights)
        for weights in WEIGHTS
        for target in TARGETS
        for method in (PROMPT8 if weights == "prompt8" else picture_methods())
        if (target, weights) not in UNSERVED
    ]
    return plain + [Case(one, target, "float32", then) for one, then in THEN.items() for target in TARGETS]


def select(words: Sequence[str]) -> list[Case]:
    """The cases that any word names: a method, a target, weights, or several joined by "-"; none: all."""
    known = {part for case in cases() for part in case.name.split("-")}
    words = [one for word in words for one in (QUICK if word == "quick" else (word,))]
    for word in words:
        if unknown := set(word.split("-")) - known:
            raise SystemExit(
                f"{word}: no {', '.join(sorted(unknown))}; there are quick, {', '.join(sorted(known))}"
            )
    return [
        case
        for case in cases()
        if not words or any(set(word.split("-")) <= set(case.name.split("-")) for word in words)
    ]


def digest(paths: Iterable[Path]) -> str:
    """sha256 of the names and bytes of files, and of all .py and model files below folders."""
    found = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and file.suffix != ".pyc":
                found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()
