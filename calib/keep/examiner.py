"""Puts the questions to a bundle at a keep-count, and scores what it answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vtp.calib import metrics
from vtp.calib.data import Sample
from vtp.calib.keep.journal import Answer, Journal
from vtp.calib.workers.local import Job, Workers
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import MANIFEST, Bundle
from vtp.runtime.machine.conditions import Conditions, conditions

NEW_TOKENS = 32
_TIMED = 15  # questions that are timed here where others answered


@dataclass(frozen=True)
class Marks:
    """One keep-count's result: a score from 0 to 1 for every question, and the median TTFT in ms.

    earlier  whether an earlier run took times that are among the median's
    """

    keep: int
    scores: list[float]
    ttft: float
    earlier: bool = False


@dataclass(frozen=True)
class Paper:
    """Questions for one worker: (picture, prompt) each, the keep-count, and how long answers may be.

    system  what the conversation begins with; "": nothing
    """

    questions: tuple[tuple[Path, str], ...]
    keep: int
    max_new_tokens: int
    system: str = ""

    def asking(self, prompt: str) -> dict[str, Any]:
        """How a question is asked, as keyword arguments of `Pipeline.generate`."""
        if not self.system:
            return {"prompt": prompt}
        texts = {"system": self.system, "user": prompt}
        lists = {role: [{"type": "text", "text": text}] for role, text in texts.items()}
        lists["user"].insert(0, {"type": "image"})  # lists: some templates drop a text that is in none
        return {"messages": [{"role": role, "content": parts} for role, parts in lists.items()]}


@dataclass(frozen=True)
class Exam(Job[Paper, list[Answer]]):
    """A bundle that answers papers. `name` tells apart what lies in one folder one after the other."""

    folder: Path
    name: str
    engine: str
    threads: int | None
    pictures: tuple[Path, ...] = dataclasses.field(compare=False)

    def files(self) -> Sequence[Path]:
        """The bundle and the pictures."""
        return [self.folder / MANIFEST, *self.pictures]

    @contextmanager
    def open(self) -> Iterator[Callable[[Paper], list[Answer]]]:
        """A pipeline, warmed up: the first run pays for set-up, which no figure should hold."""
        with Pipeline.load(self.folder, self.engine, self.threads) as pipe:
            pipe.warmup()
            yield partial(_write, pipe)


def _write(pipe: Pipeline, paper: Paper) -> list[Answer]:
    results = [
        pipe.generate(
            image, keep_tokens=paper.keep, max_new_tokens=paper.max_new_tokens, **paper.asking(prompt)
        )
        for image, prompt in paper.questions
    ]
    return [Answer(one.raw_text, one.token_ids, round(one.timings.ttft, 3)) for one in results]


class Examiner:
    """A bundle under examination on fixed questions. Answers come from the journal where it has them."""

    def __init__(
        self,
        bundle: Bundle,
        engine: str,
        threads: int | None,
        samples: Sequence[Sample],
        journal: Journal,
        workers: Workers,
        *,
        max_new_tokens: int = NEW_TOKENS,
        system: str = "",
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.bundle = bundle
        self.engine = engine
        self.samples = samples
        self.max_new_tokens = max_new_tokens
        self._system = system
        self._journal = journal
        self._workers = workers
        self._progress = progress
        self.conditions = conditions(engine, threads)
        self._name = identity(bundle, max_new_tokens, self.conditions, system)
        pictures = tuple(dict.fromkeys(sample.image.absolute() for sample in samples))
        self._exam = Exam(bundle.folder.absolute(), self._name, engine, threads, pictures)

    def sitting(self, kind: type[Exam], word: str) -> Examiner:
        """The same bundle and questions in another kind of exam; `word` tells its answers from this one's."""
        other = copy(self)
        other._name = hashlib.sha256(f"{word} {self._name}".encode()).hexdigest()[:24]
        given = {one.name: getattr(self._exam, one.name) for one in dataclasses.fields(self._exam)}
        other._exam = kind(**{**given, "name": other._name})
        other._progress = lambda step: self._progress(f"{word}: {step}")
        return other

    def answers(self, keep: int) -> list[Answer]:
        """Greedy answers to every question."""
        asked = {sample.key: sample for sample in self.samples}
        missing = [sample for key, sample in asked.items() if self._known(keep, key) is None]
        if missing:
            known = len(asked) - len(missing)
            again = f" ({known} known)" if known else ""
            self._progress(f"{len(missing)} questions at {keep} tokens kept{again}")
            self._ask(missing, keep)
        return [self._answer(keep, sample) for sample in self.samples]

    def marks(self, keep: int, metric: str, reference: Sequence[Answer] | None = None) -> Marks:
        """Score the answers at a keep-count; `reference` holds the unpruned ones, for metric "agreement"."""
        answers = self.answers(keep)
        scores, ttft = score(answers, self.samples, metric, reference), self._ttft(keep, answers)
        earlier = any(self._journal.is_earlier(self._name, keep, sample.key) for sample in self.samples)
        return Marks(keep, scores, ttft, earlier)

    def _ask(self, samples: Sequence[Sample], keep: int) -> None:
        size = self._workers.group
        groups = [samples[start : start + size] for start in range(0, len(samples), size)]
        papers = [self._paper(group, keep, self.max_new_tokens) for group in groups]
        timed = self._workers is self._workers.here
        for group, answers in zip(groups, self._workers.run(self._exam, papers), strict=True):
            for sample, answer in zip(group, answers, strict=True):
                kept = answer if timed else dataclasses.replace(answer, ttft=None)
                self._journal.add(self._name, keep, sample.key, kept)

    def _ttft(self, keep: int, answers: Sequence[Answer]) -> float:
        """Median milliseconds to the first token on this machine; others' answers are timed here again."""
        times = [answer.ttft for answer in answers if answer.ttft is not None]
        lacking = [one for one in self.samples if self._answer(keep, one).ttft is None]
        for sample in lacking[: max(0, _TIMED - len(times))]:
            paper = self._paper([sample], keep, 1)
            ((first,),) = self._workers.here.run(self._exam, [paper])
            answer = dataclasses.replace(self._answer(keep, sample), ttft=first.ttft)
            self._journal.add(self._name, keep, sample.key, answer)
            times.append(first.ttft or 0.0)
        return statistics.median(times)

    def _paper(self, samples: Sequence[Sample], keep: int, max_new_tokens: int) -> Paper:
        questions = tuple((sample.image.absolute(), sample.prompt) for sample in samples)
        return Paper(questions, keep, max_new_tokens, self._system)

    def _known(self, keep: int, key: str) -> Answer | None:
        return self._journal.get(self._name, keep, key)

    def _answer(self, keep: int, sample: Sample) -> Answer:
        found = self._known(keep, sample.key)
        assert found is not None  # `answers` asked for all
        return found


def score(
    answers: Sequence[Answer], samples: Sequence[Sample], metric: str, reference: Sequence[Answer] | None
) -> list[float]:
    """A score from 0 to 1 for every answer."""
    if metric == "agreement":
        assert reference is not None  # callers that choose this metric have it
        pairs = zip(answers, reference, strict=True)
        return [metrics.agreement(answer.tokens, wanted.tokens) for answer, wanted in pairs]
    judge = {"exact": metrics.exact, "vqa": metrics.vqa, "gqa": metrics.gqa, "pope": metrics.pope}[metric]
    return [judge(answer.text, sample.answers) for answer, sample in zip(answers, samples, strict=True)]


def identity(bundle: Bundle, max_new_tokens: int, measured: Conditions, system: str = "") -> str:
    """What tells one bundle's answers from another's, and from its own under other conditions.

    A hash over its files' hashes, the answers' length, engine, threads, machine and versions, and the system
    prompt, if there is one.
    """
    files = sorted((name, info.sha256) for name, info in bundle.manifest.files.items())
    asked = [files, max_new_tokens, measured.to_json(), *([system] if system else [])]
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
