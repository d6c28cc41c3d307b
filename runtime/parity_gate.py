"""The parity gate: what TensorRT made of a bundle's graphs, held against ONNX Runtime on real inputs.

A picture and a prompt go through the bundle on ONNX Runtime's CPU provider, one graph open at a time; every
built engine is given what its graph was given, at the prompt and at one step after it, and its answers are
compared. An engine that was not compared on this device, or differs, is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from vtp.engines import Engine, VtpError, open_graph
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import GraphInfo, StageInfo
from vtp.runtime.compare import compare
from vtp.runtime.example_input import PROMPT, sample_for
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter

LIMITS = "float16 kernels"  # of the comparator's table: sums of a built engine may be float16 themselves
OVERLAP = 0.9  # least share of kept tokens in common, where float16 turns close calls
_ORACLE = "ort-cpu"
_CACHE = "past_key_values."


@dataclass(frozen=True)
class Case:
    """One run of one graph: the arrays it was given, what ONNX Runtime gave, and how much cache is valid."""

    file: str
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
        walk = _Walk(bundle, preprocess(looked_at, image), encoded.ids, encoded.image_start)
        for case in walk.cases(keep):
            if keep == first or case.file not in seen:
                seen.add(case.file)
                yield case


class _Walk:
    """One prompt through a bundle, graph after graph, with every tensor on the host."""

    def __init__(self, bundle: Bundle, pixels: np.ndarray, ids: list[int], image_start: int) -> None:
        self._bundle = bundle
        self._values = {
            "pixel_values": pixels,
            "input_ids": np.array([ids], np.int64),
            "image_start": np.array([[image_start]], np.int64),
            "text_length": np.array([len(ids)], np.int64),
        }
        self._caches: dict[str, dict[str, np.ndarray]] = {}
        self._lengths: dict[str, int] = {}

    def cases(self, keep: int) -> Iterator[Case]:
        """Every stage of the picture and the prompt, then one step with the token that comes first."""
        manifest = self._bundle.manifest
        for when in ("image", "prefill"):
            yield from map(self._run, manifest.stages_for(when, keep))
        self._values["input_ids"] = (
            self._values["logits"][:, 0].argmax(axis=-1).reshape(1, 1).astype(np.int64)
        )
        first = self._values["position_ids"][:, :1]  # [1,1], or [1,1,A] along A axes
        self._values["position_ids"] = np.full_like(first, self._values["next_position"][0])
        yield from map(self._run, manifest.stages_for("step", keep))

    def _run(self, stage: StageInfo) -> Case:
        graph = self._bundle.manifest.graphs[stage.file]
        feeds = {
            name: self._values[source].astype(graph.inputs[name].dtype)
            for name, source in stage.inputs.items()
        }
        if graph.kv is not None:
            feeds |= self._cached(stage.file, graph, feeds["position_ids"].shape[1])
        engine = open_graph(self._bundle.path(stage.file), _ORACLE)
        try:
            given = {name: engine.put(array) for name, array in feeds.items()}
            outputs = {name: value.numpy() for name, value in engine.run(given).items()}
        finally:
            engine.close()
        for name, target in stage.outputs.items():
            self._values[target] = outputs[name]
        if graph.kv is not None:
            self._caches[stage.file] = {
                name: outputs["present." + name.removeprefix(_CACHE)]
                for name in feeds
                if name.startswith(_CACHE)
            }
        return Case(stage.file, feeds, outputs, self._lengths.get(stage.file, 0))

    def _cached(self, file: str, graph: GraphInfo, tokens: int) -> dict[str, np.ndarray]:
        """The cache so far, and lengths after this run."""
        kv = graph.kv
        assert kv is not None  # by the caller
        length = self._lengths[file] = self._lengths.get(file, 0) + tokens
        shape = (1, kv.heads, kv.capacity, kv.head_dim)
        names = [name for name in graph.inputs if name.startswith(_CACHE)]
        caches = self._caches.get(file) or {name: np.zeros(shape, kv.dtype) for name in names}
        lengths = {
            "seqlens_k": np.array([length - 1], np.int32),
            "total_sequence_length": np.array(length, np.int32),
        }
        return {**caches, **lengths}


def _answer(engine: Engine, case: Case) -> dict[str, np.ndarray]:
    feeds = {name: engine.put(array) for name, array in case.feeds.items()}
    # As at run time: a cache is one value, past and present.
    into = {
        f"present.{name.removeprefix(_CACHE)}": value
        for name, value in feeds.items()
        if name.startswith(_CACHE)
    }
    return {name: value.numpy() for name, value in engine.run(feeds, into).items()}


def judge(case: Case, found: Mapping[str, np.ndarray], verdict: Verdict) -> None:
    """Add one case to a verdict. Rows that follow from kept indices are compared where these are equal."""
    verdict.cases += 1
    kept = case.outputs.get("keep_indices")
    same_rows = kept is None or np.array_equal(kept, found["keep_indices"])
    for name, wanted in case.outputs.items():
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
    result = compare(mine, wanted, LIMITS)
    verdict.cosine = min(verdict.cosine, result.cosine)
    verdict.relative = max(verdict.relative, result.relative)
    verdict.compared += result.rows > 0
    if not result.ok:
        verdict.problems.append(f"{name}: {result.why}")
