"""A random choice in the place of a pruner's: the same bundle, the same number of tokens, no torch.

The pruner's graph is opened as ever, so that names, shapes and devices are its own, but it never runs: what
it would keep is drawn with numpy, anew for every question, and the kept rows are taken as they came in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vtp.calib.data import picture_hash
from vtp.calib.keep import examiner
from vtp.calib.keep.examiner import Exam, Paper
from vtp.calib.keep.journal import Answer
from vtp.engines import Engine, Value
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.manifest import Manifest, StageInfo
from vtp.runtime.opening import Opening

_ROWS = {"kept_features": "image_features", "kept_embeds": "image_embeds"}  # output -> the input it is of
_BASELINES = ("none", "random", "uniform")


def why_not(manifest: Manifest, keep: int) -> str | None:
    """Why a bundle has no random choice beside it at a keep-count, in words; "" if it needs none, for it is a
    baseline itself. None: it has one."""
    if manifest.method.name in _BASELINES:
        return ""
    stages, then = _pruners(manifest, keep), manifest.method.then
    if then is not None:
        return f"{then.name} chooses inside the decoder among what {manifest.method.name} kept"
    if len(stages) != 1 or not set(_ROWS) & set(stages[0].outputs):
        return f"{manifest.method.name} chooses inside the decoder"
    patches = manifest.graphs[stages[0].file].inputs[_source(stages[0])].shape[1]
    after = [stage for stage in manifest.stages_for("prefill", keep) if stage is not stages[0]]
    if patches != manifest.visual.count and any("keep_indices" in one.inputs.values() for one in after):
        return "the places of its patches among the visual tokens are known to its pruner alone"
    return None


def _pruners(manifest: Manifest, keep: int) -> list[StageInfo]:
    return [stage for stage in manifest.stages_of("pruner") if stage.keep in (None, keep)]


def _source(stage: StageInfo) -> str:
    """The pruner's input whose rows are kept."""
    return next(_ROWS[name] for name in stage.outputs if name in _ROWS)


@dataclass
class Draws:
    """Numbers for one question after the other: a question gets the same ones wherever it is asked."""

    random: np.random.Generator

    def begin(self, seed: int) -> None:
        """Go on with a question's own numbers."""
        self.random = np.random.default_rng(seed)

    def choose(self, count: int, keep: int) -> np.ndarray:
        """int64 [keep], ascending, of 0 .. count - 1; fewer are a part of more, for the same numbers."""
        return np.sort(self.random.permutation(count)[:keep]).astype(np.int64)


class RandomChoice(Engine):
    """A pruner's opened graph, whose answer is drawn: keep_indices [B,K] and rows [B,K,C] of what came in."""

    def __init__(self, draws: Draws, source: str, engine: Engine) -> None:
        """`source` is the input whose rows are kept."""
        self.inputs, self.outputs, self.notes = engine.inputs, engine.outputs, engine.notes
        self._draws, self._source, self._engine = draws, source, engine

    def put(self, array: np.ndarray) -> Value:
        """As the graph's own engine."""
        return self._engine.put(array)

    def adopt(self, value: Value) -> Value:
        """As the graph's own engine."""
        return self._engine.adopt(value)

    def zeros(self, shape: Sequence[int], dtype: str) -> Value:
        """As the graph's own engine."""
        return self._engine.zeros(shape, dtype)

    def run(self, feeds: Mapping[str, Value], into: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Draw K places for every picture, and take the rows there."""
        rows, keep = feeds[self._source].numpy(), self.outputs["keep_indices"].shape[1]
        assert isinstance(keep, int)  # K is a constant of every pruner's graph
        places = np.stack([self._draws.choose(rows.shape[1], keep) for _ in rows])
        taken = np.take_along_axis(rows, places[:, :, None], axis=1)
        made = {name: places if name == "keep_indices" else taken for name in self.outputs}
        if into is None:
            return {name: self.put(array) for name, array in made.items()}
        for name, array in made.items():
            into[name].update(array)
        return {name: into[name] for name in made}

    def close(self) -> None:
        """Free the graph."""
        self._engine.close()


@dataclass(frozen=True)
class RandomExam(Exam):
    """The same bundle answering with tokens kept at random."""

    @contextmanager
    def open(self) -> Iterator[partial[list[Answer]]]:
        """A pipeline whose pruners are replaced, warmed up."""
        draws = Draws(np.random.default_rng(0))
        with Pipeline.load(
            self.folder, self.engine, self.threads, opening=Opening(wrapped=_wrapped(self.folder, draws))
        ) as pipe:
            pipe.warmup()
            yield partial(_write, pipe, draws)


def _wrapped(folder: Path, draws: Draws) -> dict[str, partial[RandomChoice]]:
    """Graph file -> what its opened graph becomes."""
    stages = open_bundle(folder).manifest.stages_of("pruner")
    return {stage.file: partial(RandomChoice, draws, _source(stage)) for stage in stages}


def _write(pipe: Pipeline, draws: Draws, paper: Paper) -> list[Answer]:
    answers = []
    for image, prompt in paper.questions:
        draws.begin(question_seed(image, prompt))
        answers += examiner._write(pipe, Paper(((image, prompt),), paper.keep, paper.max_new_tokens))
    return answers


def question_seed(image: Path, prompt: str) -> int:
    """A number of a question's own: of its picture's bytes and its words."""
    text = json.dumps([picture_hash(image), prompt])
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
