"""One measurement of the scaling study, in a process that keeps its bundle open between measurements."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtp.bench.common import flops
from vtp.bench.measure import Shapes, axes_of, endless, noting, part_of
from vtp.engines import Choice, VtpError
from vtp.engines.child import spawn
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.manifest import TOKENIZER
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.result import Result

ENGINE = "ort-cpu"
PARTS = ("preprocess", "encoder", "pruner", "prefill", "host")
_WORDS = (
    "is",
    "the",
    "light",
    "on",
    "left",
    "green",
    "or",
    "red",
    "and",
    "how",
    "many",
    "people",
    "are",
    "there",
)


@dataclass(frozen=True)
class Point:
    """One request, or several alike.

    pictures  of a prompt, each with the bundle's N visual tokens
    keep      of each picture
    text      text tokens of the prompt, at least; the template's are in them
    batch     prompts that go through the graphs together
    streams   processes that answer at the same time, each for itself
    """

    pictures: int = 1
    keep: int = 64
    text: int = 32
    batch: int = 1
    streams: int = 1


class Bench:
    """A bundle, opened once, and requests to it."""

    def __init__(self, folder: str, image: str, threads: int, tokens: int) -> None:
        self._bundle = endless(open_bundle(folder))
        self._pipe = Pipeline(self._bundle, Choice(ENGINE), threads)
        self._prompter = Prompter(self._bundle.manifest.text, self._bundle.path(TOKENIZER))
        self._image, self._tokens = image, tokens
        self._prompts: dict[tuple[int, int], str] = {}
        self._counted: dict[tuple[str, tuple[Any, ...]], int] = {}

    def ask(self, point: Point) -> dict[str, Any]:
        """Answer a point's prompts: milliseconds to the first token and of each further step, by part too,
        floating point operations by part, and how many tokens there were."""
        prompt, shapes = self._prompt(point), Shapes()
        images = [[self._image] * point.pictures for _ in range(point.batch)]
        options: dict[str, Any] = {"keep_tokens": point.keep, "max_new_tokens": self._tokens}
        with noting(shapes):
            if point.batch == 1:
                result = self._pipe.generate(images[0], prompt, **options)
            else:
                result = self._pipe.generate_batch(images, [prompt] * point.batch, **options)[-1]
        return {
            "ttft": result.timings.ttft,
            "tpot": result.timings.tpot,
            "parts": self._parts(result),
            "flops": self._work(shapes),
            "before": result.visual_tokens.before,
            "after": result.visual_tokens.after,
            "text": result.prompt_tokens,
        }

    def close(self) -> None:
        """Free the graphs."""
        self._pipe.close()

    def _parts(self, result: Result) -> dict[str, float]:
        parts = dict.fromkeys(PARTS, 0.0)
        for stage, ms in result.timings.stages.items():
            parts[part_of(self._bundle.manifest, stage)] += ms
        parts["host"] += result.timings.ttft - sum(parts.values())
        return parts

    def _work(self, shapes: Shapes) -> dict[str, int]:
        work: Counter[str] = Counter()
        for stage, file, given in shapes.runs:
            work[part_of(self._bundle.manifest, stage)] += self._count(file, given)
        return {part: work[part] for part in PARTS if work[part]}

    def _count(self, file: str, given: dict[str, tuple[int, ...]]) -> int:
        key = file, tuple(sorted(given.items()))
        if key not in self._counted:
            axes = axes_of(self._bundle.manifest, file, given)
            self._counted[key] = flops.count(self._bundle.path(file), axes).total
        return self._counted[key]

    def _prompt(self, point: Point) -> str:
        """The shortest run of words that makes a prompt of this many text tokens."""
        wanted = point.text, point.pictures
        if wanted not in self._prompts:
            low, high = 1, point.text
            while low < high:
                middle = (low + high) // 2
                low, high = (
                    (low, middle)
                    if self._length(middle, point.pictures) >= point.text
                    else (middle + 1, high)
                )
            self._prompts[wanted] = _words(low)
        return self._prompts[wanted]

    def _length(self, words: int, pictures: int) -> int:
        messages = self._prompter.messages_for(_words(words), pictures)
        return self._prompter.encode(messages, pictures).text_tokens


def _words(count: int) -> str:
    return " ".join(_WORDS[place % len(_WORDS)] for place in range(count))


# -- processes -----------------------------------------------------------------------------------------------


class Stream:
    """A `Bench` in a process of its own."""

    def __init__(self, folder: Path, image: Path, threads: int, tokens: int) -> None:
        """Start opening it; the first `take` waits for that."""
        self._process, self._ours = spawn(_serve, str(folder), str(image), threads, tokens)
        self.take()

    def give(self, point: Point) -> None:
        """Ask; the answer comes by `take`."""
        self._ours.send(dataclasses.asdict(point))

    def take(self) -> dict[str, Any]:
        """The answer to the last question. Raises VtpError when there is none."""
        try:
            found: dict[str, Any] = self._ours.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise VtpError(
                f"the process that measured left with {self._process.exitcode} (out of memory?)"
            ) from error
        if "error" in found:
            raise VtpError(found["error"])
        return found

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Any, folder: str, image: str, threads: int, tokens: int) -> None:
    """The other end: open, then answer points until the pipe closes."""
    try:
        bench = Bench(folder, image, threads, tokens)
        bench.ask(Point(keep=bench._bundle.manifest.visual.default_keep))
        pipe.send({"ready": True})
        while True:
            pipe.send(bench.ask(Point(**pipe.recv())))
    except VtpError as error:
        pipe.send({"error": str(error)})
    except EOFError:
        bench.close()


@contextmanager
def streams(count: int, folder: Path, image: Path, threads: int, tokens: int) -> Iterator[list[Stream]]:
    """This many processes with the bundle open, opened one after the other."""
    opened: list[Stream] = []
    try:
        for _ in range(count):
            opened.append(Stream(folder, image, threads, tokens))
        yield opened
    finally:
        for one in opened:
            one.close()


def together(benches: list[Stream], point: Point) -> dict[str, Any]:
    """One request to each of the first `point.streams` processes at once: the slowest one's figures, and the
    milliseconds until all had answered."""
    chosen, started = benches[: point.streams], time.perf_counter()
    for one in chosen:
        one.give(point)
    found = [one.take() for one in chosen]
    slowest = max(found, key=lambda answer: answer["ttft"])
    return {**slowest, "wall": (time.perf_counter() - started) * 1e3}
