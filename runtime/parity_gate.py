"""The parity gate: what TensorRT made of a bundle's graphs, held against ONNX Runtime on real inputs.

A picture and a prompt go through the bundle on ONNX Runtime's CPU provider, one graph open at a time; every
built engine is given what its graph was given, at the prompt and at one step after it, and its answers are
compared. An engine that was not compared on this device, or differs, is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from vtp.engines import Engine, Value, VtpError, open_graph
from vtp.engines.base import TensorSpec
from vtp.runtime.bundle.caches import present_of
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import TensorInfo
from vtp.runtime.bundle.stream_info import RECOMPUTED, STREAM
from vtp.runtime.compare import compare
from vtp.runtime.example_input import PROMPT, sample_for
from vtp.runtime.opening import every_graph
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompt, Prompter
from vtp.runtime.stages.runner import StageRunner
from vtp.runtime.stages.stage import Stage

LIMITS = "float16 kernels"  # of the comparator's table: sums of a built engine may be float16 themselves
OVERLAP = 0.9  # least share of kept tokens in common, where float16 turns close calls
_ORACLE = "ort-cpu"


@dataclass(frozen=True)
class Case:
    """One run of one graph: the arrays it was given, what ONNX Runtime gave, and how much cache is valid.

    when  the moment of its stage, such as "prefill" or "step"
    """

    file: str
    when: str
    feeds: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    length: int = 0


@dataclass
class Verdict:
    """How the answers of one engine compare with ONNX Runtime's, over all its cases.

    cosine, relative  the least and the largest of all rows of float outputs
    overlap           least share of kept indices in common
    exact             whether all of them must be in common
    cases, compared   how many cases there were, and how many of their outputs were compared
    """

    exact: bool = False
    cosine: float = 1.0
    relative: float = 0.0
    overlap: float = 1.0
    cases: int = 0
    compared: int = 0
    problems: list[str] = field(default_factory=list)

    def to_gate(self, device: str) -> dict[str, Any]:
        """What an engine's stamp keeps."""
        return {
            "passed": self.compared > 0 and not self.problems,
            "note": "; ".join(self.problems[:3]),
            "cosine": self.cosine,
            "relative": self.relative,
            "kept_in_common": self.overlap,
            "cases": self.cases,
            "compared": self.compared,
            "device": device,
            "against": _ORACLE,
        }


def run_gate(
    bundle: Bundle,
    open_built: Callable[[str], Engine],
    picture: Image.Image | None = None,
    prompt: str = PROMPT,
    say: Callable[[str], None] = lambda line: None,
    exact: Collection[str] = (),
) -> dict[str, Verdict]:
    """Compare the built engine of every graph; `open_built` opens one by its graph's file name.

    Those of the graphs in `exact` must keep exactly ONNX Runtime's tokens.
    """
    verdicts: dict[str, Verdict] = {}
    for case in cases(bundle, picture, prompt):
        say(f"compare {case.file} with ONNX Runtime")
        verdict = verdicts.setdefault(case.file, Verdict(exact=case.file in exact))
        try:
            engine = open_built(case.file)
            try:
                judge(case, _answer(engine, case), verdict)
            finally:
                engine.close()
        except VtpError as error:
            verdict.problems.append(str(error))
    return verdicts


def cases(bundle: Bundle, picture: Image.Image | None = None, prompt: str = PROMPT) -> Iterator[Case]:
    """Walk the bundle on ONNX Runtime's CPU provider: every graph of the default keep-count, then others'."""
    manifest = bundle.manifest
    image = manifest.image
    looked_at = picture or sample_for(image)
    prompter = Prompter(manifest.text, bundle.path("tokenizer.json"))
    encoded = prompter.encode(prompter.messages_for(prompt))
    seen: set[str] = set()
    first = manifest.visual.default_keep
    for keep in (first, *(one for one in manifest.visual.keep if one != first)):
        for case in _walk(bundle, keep, preprocess(looked_at, image), encoded):
            if keep == first or case.file not in seen:
                seen.add(case.file)
                yield case


def _walk(bundle: Bundle, keep: int, pixels: np.ndarray, prompt: Prompt) -> Iterator[Case]:
    """Every stage of the picture and the prompt, then one step with the token that comes first."""
    engines: dict[str, _RecordingEngine] = {}

    def open_engine(file: str) -> Engine:
        engines[file] = _RecordingEngine(bundle, file)
        return engines[file]

    def run(stage: Stage, values: dict[str, Value]) -> Case:
        stage.run(values)
        info, engine = stage.info, engines[stage.info.file]
        length = stage.cache.length if stage.cache else 0
        return Case(info.file, info.when, engine.feeds, engine.found, length)

    runner = StageRunner(bundle, _ORACLE, None, every_graph(bundle), open_engine=open_engine)
    given = {
        "pixel_values": pixels.astype(runner.dtype_of("pixel_values")),
        "input_ids": np.array([prompt.ids], np.int64),
        "image_start": np.array([[prompt.image_start]], np.int64),
        "text_length": np.array([len(prompt.ids)], np.int64),
    }
    given["reference_picture"] = np.zeros_like(given["pixel_values"])  # for a method that compares
    values: dict[str, Value] = {name: _HostValue(array) for name, array in given.items()}
    yield from (run(stage, values) for stage in runner.stages("image", keep))
    # The same picture again: whichever rows an engine recomputes, the answer is the same.
    yield from (run(stage, dict(values)) for stage in runner.stages(STREAM, keep))
    yield from (run(stage, values) for stage in runner.stages("prefill", keep))
    token = values["logits"].view()[:, 0].argmax(axis=-1).reshape(1, 1)
    values["input_ids"] = _HostValue(token.astype(np.int64))
    first = values["position_ids"].view()[:, :1]  # [1,1], or [1,1,A] along A axes
    values["position_ids"] = _HostValue(np.full_like(first, values["next_position"].view()[0]))
    yield from (run(stage, values) for stage in runner.stages("step", keep))


class _HostValue(Value):
    """An array on the host. An update puts another array in its place, so anyone who has one keeps it."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    def numpy(self) -> np.ndarray:
        return self._array.copy()

    def view(self) -> np.ndarray:
        return self._array

    def update(self, array: np.ndarray) -> None:
        self._array = array


class _RecordingEngine(Engine):
    """A graph on ONNX Runtime's CPU provider that is open only while it runs.

    feeds, found  the arrays of its latest run, inputs and outputs
    """

    def __init__(self, bundle: Bundle, file: str) -> None:
        graph = bundle.manifest.graphs[file]
        self.inputs, self.outputs = _specs(graph.inputs), _specs(graph.outputs)
        self.feeds: dict[str, np.ndarray] = {}
        self.found: dict[str, np.ndarray] = {}
        self._path = bundle.path(file)

    def put(self, array: np.ndarray) -> Value:
        return _HostValue(array.copy())

    def zeros(self, shape: Sequence[int], dtype: str) -> Value:
        return _HostValue(np.zeros(shape, dtype))

    def run(self, feeds: Mapping[str, Value], into: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Open the graph, run it, note what went in and came out, and close it again.

        Outputs are written into the values of `into` that have their names.
        """
        self.feeds = {name: value.view() for name, value in feeds.items()}
        engine = open_graph(self._path, _ORACLE)
        try:
            given = {name: engine.put(array) for name, array in self.feeds.items()}
            self.found = {name: value.numpy() for name, value in engine.run(given).items()}
        finally:
            engine.close()
        places: dict[str, Value] = {}
        for name, array in self.found.items():
            places[name] = (into or {}).get(name) or _HostValue(array)
            places[name].update(array)
        return places

    def close(self) -> None:
        """Nothing is open between runs."""


def _specs(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, info.dtype, tuple(info.shape)) for name, info in tensors.items()}


def _answer(engine: Engine, case: Case) -> dict[str, np.ndarray]:
    feeds = {name: engine.put(array) for name, array in case.feeds.items()}
    # As at run time: a cache is one value, past and present.
    into = {present: value for name, value in feeds.items() if (present := present_of(name))}
    return {name: value.numpy() for name, value in engine.run(feeds, into).items()}


def judge(case: Case, found: Mapping[str, np.ndarray], verdict: Verdict) -> None:
    """Add one case to a verdict. Rows that follow from kept indices are compared where these are equal."""
    verdict.cases += 1
    kept = case.outputs.get("keep_indices")
    same_rows = kept is None or np.array_equal(kept, found["keep_indices"])
    for name, wanted in case.outputs.items():
        if name.startswith(RECOMPUTED):  # keys that are equal but for rounding are in any order
            continue
        mine = found[name]
        if name == "keep_indices" and mine.shape == wanted.shape:
            _judge_kept(mine, wanted, verdict)
        elif same_rows or mine.shape != wanted.shape:
            _judge_rows(name, mine, wanted, case.length, verdict)


def _judge_kept(mine: np.ndarray, wanted: np.ndarray, verdict: Verdict) -> None:
    share = len(set(mine.ravel().tolist()) & set(wanted.ravel().tolist())) / wanted.size
    verdict.overlap = min(verdict.overlap, share)
    verdict.compared += 1
    if verdict.exact and share < 1:
        verdict.problems.append(f"keeps other tokens: {share:.1%} are ONNX Runtime's, and all must be")
    elif share < OVERLAP:
        verdict.problems.append(f"keeps {share:.0%} of the same tokens, less than {OVERLAP:.0%}")


def _judge_rows(name: str, mine: np.ndarray, wanted: np.ndarray, length: int, verdict: Verdict) -> None:
    if name.startswith("present.") and mine.shape == wanted.shape:  # beyond `length` a cache holds anything
        mine, wanted = mine[..., :length, :], wanted[..., :length, :]
    if name.startswith("present_") and mine.shape == wanted.shape:  # a state has no row for each token
        mine, wanted = mine.reshape(1, len(mine), -1), wanted.reshape(1, len(wanted), -1)
    result = compare(mine, wanted, LIMITS)
    verdict.cosine = min(verdict.cosine, result.cosine)
    verdict.relative = max(verdict.relative, result.relative)
    verdict.compared += result.rows > 0
    if not result.ok:
        verdict.problems.append(f"{name}: {result.why}")
