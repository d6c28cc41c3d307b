"""What is checked and measured of one bundle on one engine. Every check returns plain figures.

A check's figures hold `note`: empty when all is as it should be, else what is not, in one line.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.gpu.device import CUDA, Device
from vtp.engines import Value, VtpError, capabilities, choose_engine
from vtp.engines.ort.library import load_onnxruntime
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.build import build_bundle, compare_bundle
from vtp.runtime.compare import Comparison
from vtp.runtime.compare import compare as hold
from vtp.runtime.machine.facts import look
from vtp.runtime.media.images import load_image
from vtp.runtime.opening import Opening, engines_folder
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompt, Prompter
from vtp.runtime.result import Timings
from vtp.runtime.stages.kv_cache import KvCache
from vtp.runtime.stages.runner import StageRunner
from vtp.scenes.exam import Item, held_out, is_right, wilson

CPU = "ort-cpu"
ANSWER_TOKENS = 12  # the longest answer of the exam has fewer
WARM_UPS = 3
LIMITS = "float16 kernels"  # of the comparator's table, for logits: kernels sum in float16 or TF32


@dataclass(frozen=True)
class Job:
    """One bundle on one engine.

    reference   the same method's bundle in float32, to compare with as well; None: there is none
    questions   for `agreement`; `exam` for `accuracy`; `rounds` timed runs, `steps` tokens each
    keep        keep-count of `beside`; None: the default
    cuda_graph  whether `beside` replays what it can
    """

    bundle: str
    engine: str
    reference: str | None = None
    questions: int = 50
    exam: int = 100
    rounds: int = 20
    steps: int = 32
    keep: int | None = None
    cuda_graph: bool = True


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, the first logits float32 [V], and what each pruner kept, by the pipeline's name."""

    tokens: list[int]
    logits: np.ndarray
    kept: dict[str, list[int]]


def opening(cuda_graph: bool = False) -> Opening:
    """Graphs are opened whatever is left to the CPU: `nodes` says what is."""
    return Opening(allow_cpu_nodes=True, cuda_graph=cuda_graph)


class Opened:
    """A bundle's stages on an engine, below the pipeline: every tensor can be looked at."""

    def __init__(
        self, folder: str | Path, engine: str, keep: int | None = None, cuda_graph: bool = False
    ) -> None:
        """Open every graph, to be run at `keep` (None: its default). VtpError for what cannot run here."""
        self.bundle = open_bundle(folder)
        self.manifest = self.bundle.manifest
        choose_engine(engine, self.manifest.dtype, target=self.manifest.target)
        self.keep = keep or self.manifest.visual.default_keep
        self.stages = StageRunner(self.bundle, engine, None, opening(cuda_graph))
        self._prompter = Prompter(self.manifest.text, self.bundle.path("tokenizer.json"))

    def encode(self, prompt: str) -> Prompt:
        """A question as token ids."""
        return self._prompter.encode(self._prompter.messages_for(prompt))

    @property
    def lengths(self) -> dict[str, int]:
        """Decoder graph -> tokens in its cache."""
        return {file: cache.length for file, cache in self.stages.caches.items()}

    @property
    def notes(self) -> list[str]:
        """What the engine could not do as asked."""
        return self.stages.notes

    def prefill(self, item: Item, timings: Timings | None = None) -> dict[str, Value]:
        """Everything up to the first logits."""
        pixels = preprocess(load_image(item.image), self.manifest.image)
        prompt = self.encode(item.prompt)
        return self.stages.prefill(self.keep, pixels, prompt.ids, prompt.image_start, timings or Timings())

    def answer(self, item: Item) -> Answer:
        """Greedy tokens up to an end-of-sequence id, at most ANSWER_TOKENS."""
        values = self.prefill(item)
        first = values["logits"].numpy()[0, 0].astype(np.float32)
        kept = {
            name: value.numpy()[0].tolist()
            for name, value in values.items()
            if name.startswith("keep_indices")
        }
        position = int(values["next_position"].numpy()[0])
        tokens = [int(first.argmax())]
        while tokens[-1] not in self.manifest.text.eos_token_ids and len(tokens) < ANSWER_TOKENS:
            tokens.append(int(self.stages.step(self.keep, tokens[-1], position).argmax()))
            position += 1
        return Answer(tokens, first, kept)

    def close(self) -> None:
        """Free the graphs."""
        self.stages.close()


class WaitingTimings(Timings):
    """Times a stage from an idle device to an idle device: a run may return before its kernels are done."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time that the body takes to a stage, waiting before and after."""
        self._device.wait()
        with super().measure(stage):
            yield
            self._device.wait()


def times(job: Job, device: Device) -> dict[str, Any]:
    """Milliseconds per stage, one decode step, TTFT and TPOT (median, quartiles), and memory in bytes.

    Stages and steps are timed one by one on an idle device. TTFT and TPOT are what a caller of the pipeline
    sees, preprocessing included. `memory` is what opening and running added: of the GPU (ONNX Runtime's arena
    never shrinks, so what it holds after the run was its peak), or to this process's peak on the CPU.
    """
    item, before = next(iter(held_out(1))), device.used()
    seen: dict[str, list[float]] = {}
    with closing(Opened(job.bundle, job.engine)) as opened:
        for number in range(WARM_UPS + job.rounds):
            timings = WaitingTimings(device)
            values = opened.prefill(item, timings)
            steps = _steps(opened, values, job.steps, device)
            if number >= WARM_UPS:
                for stage, ms in timings.stages.items():
                    seen.setdefault(stage, []).append(ms)
                seen.setdefault("decode step", []).extend(steps)
        memory = device.used() - before
    with Pipeline.load(job.bundle, engine=job.engine, opening=opening()) as pipe:
        for number in range(WARM_UPS + job.rounds):
            result = pipe.generate(item.image, item.prompt, max_new_tokens=ANSWER_TOKENS)
            if number >= WARM_UPS:
                seen.setdefault("ttft", []).append(result.timings.ttft)
                if len(result.token_ids) > 1:
                    seen.setdefault("tpot", []).append(result.timings.tpot)
    return {"note": "", "ms": {name: spread(values) for name, values in seen.items()}, "memory": memory}


def _steps(opened: Opened, values: dict[str, Value], count: int, device: Device) -> list[float]:
    """Milliseconds of each of `count` steps (as many as the cache has room for), logits on the host."""
    position, found = int(values["next_position"].numpy()[0]), []
    for number in range(min(count, opened.stages.room())):
        device.wait()
        started = time.perf_counter()
        opened.stages.step(opened.keep, 0, position + number)
        device.wait()
        found.append((time.perf_counter() - started) * 1e3)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and count."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    return {
        "median": round(middle, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "runs": len(values),
    }


def nodes(job: Job, device: Device) -> dict[str, Any]:
    """Nodes of every graph by provider, those that CUDA left to the CPU by operator, and copies.

    Asked of the session at load (its own record of the assignment), not profiled: that takes no inputs and
    misses no branch that one input does not take. Copies between the devices are added to the graph after the
    assignment, so they are counted in the optimised graph.
    """
    bundle = open_bundle(job.bundle)
    graphs = {name: _assignment(bundle.path(name), job.engine) for name in bundle.manifest.graphs}
    strays = [f"{name}: {_counts(found['strays'])}" for name, found in graphs.items() if found["strays"]]
    return {"note": f"on the CPU: {'; '.join(strays)}" if strays else "", "graphs": graphs}


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{operator} {count}" for operator, count in found.items())


def _assignment(path: Path, engine: str) -> dict[str, Any]:
    """How many nodes each provider of ONNX Runtime runs, which are not on the GPU, and copies between."""
    import onnx

    ort = load_onnxruntime()

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        own = "CUDAExecutionProvider" if engine == CUDA else "CPUExecutionProvider"
        session = ort.InferenceSession(path, options, list(dict.fromkeys([own, "CPUExecutionProvider"])))
        if session.get_providers()[0] != own:
            raise VtpError(f"ONNX Runtime could not start {own} on this machine")
        if not hasattr(session, "get_provider_graph_assignment_info"):
            raise VtpError(f"ONNX Runtime {ort.__version__} does not tell where nodes run; 1.31 does")
        found = [
            (part.ep_name, node.op_type)
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
        written = onnx.load(options.optimized_model_filepath, load_external_data=False)
    copies = Counter(node.op_type for node in written.graph.node if node.op_type.startswith("Memcpy"))
    return {
        "providers": dict(Counter(provider for provider, _ in found)),
        "strays": dict(Counter(operator for provider, operator in found if provider != own)),
        "copies": dict(copies),
    }


def cache(job: Job, device: Device) -> dict[str, Any]:
    """Whether a decode step writes its keys and values into the bound buffers, and nothing else there.

    Compares every layer's buffer before and after one step: the next free row must change, no other may.
    """
    with closing(Opened(job.bundle, job.engine)) as opened:
        values = opened.prefill(next(iter(held_out(1))))
        position = int(values["next_position"].numpy()[0])
        caches = opened.stages.caches
        lengths = opened.lengths
        before = _buffers(caches)
        opened.stages.step(opened.keep, 0, position)
        device.wait()
        after = _buffers(caches)
    wrong = []
    for (file, slot), old in before.items():
        changed = np.flatnonzero((old != after[file, slot]).any(axis=(0, 1, 3))).tolist()
        if changed != [lengths[file]]:
            wrong.append(f"{file} {slot}: rows {changed[:4]} changed, not {lengths[file]}")
    return {"note": wrong[0] if wrong else "", "buffers": len(before), "wrong": len(wrong)}


def _buffers(caches: Mapping[str, KvCache]) -> dict[tuple[str, str], np.ndarray]:
    return {
        (file, name): value.numpy()
        for file, cache in caches.items()
        for name, value in cache.feeds.items()
        if name.startswith("past_key_values.")
    }


def agreement(job: Job, device: Device) -> dict[str, Any]:
    """Greedy tokens, first logits and kept indices against ort-cpu: same bundle, and float32 where given."""
    items = list(held_out(job.questions))
    found = _answers(job.bundle, job.engine, items)
    compared = {"same bundle": compare(found, _answers(job.bundle, CPU, items))}
    if job.reference:
        keep = open_bundle(job.bundle).manifest.visual.default_keep
        compared["float32"] = compare(found, _answers(job.reference, CPU, items, keep))
    notes = [f"{name}: {figures['note']}" for name, figures in compared.items() if figures["note"]]
    return {"note": "; ".join(notes), "against": compared}


def _answers(
    folder: str, engine: str, items: Sequence[Item], keep: int | None = None, recorded: bool = False
) -> list[Answer]:
    with closing(Opened(folder, engine, keep, recorded)) as opened:
        return [opened.answer(item) for item in items]


def compare(found: Sequence[Answer], wanted: Sequence[Answer]) -> dict[str, Any]:
    """Figures of two lists of answers to the same questions.

    `cosine_min` and `relative_max` are of the first logits; `kept_equal` counts questions whose every
    pruner kept the same tokens, `kept_overlap` is the least share of them in common.
    """
    logits, overlaps = [], []
    for mine, other in zip(found, wanted, strict=True):
        logits.append(hold(mine.logits, other.logits, LIMITS))
        for name, indices in other.kept.items():
            overlaps.append(len(set(indices) & set(mine.kept.get(name, []))) / len(indices))
    figures: dict[str, Any] = {
        "questions": len(found),
        "answers_equal": sum(a.tokens == b.tokens for a, b in zip(found, wanted, strict=True)),
        "cosine_min": min((one.cosine for one in logits), default=-1.0),
        "relative_max": max((one.relative for one in logits), default=float("inf")),
        "kept_equal": sum(a.kept == b.kept for a, b in zip(found, wanted, strict=True)),
        "kept_overlap": min(overlaps, default=1.0),
    }
    return {"note": _disagreement(figures, logits), **figures}


def _disagreement(figures: dict[str, Any], logits: Sequence[Comparison]) -> str:
    if not logits:
        return "no answer was compared"
    wrong = next((one for one in logits if not one.ok), None)
    notes = [f"logits: {wrong.why}"] if wrong else []
    for key, what in (("answers_equal", "answers"), ("kept_equal", "selections")):
        if figures[key] != figures["questions"]:
            notes.append(f"{figures['questions'] - figures[key]} of {figures['questions']} {what} differ")
    return ", ".join(notes)


def accuracy(job: Job, device: Device) -> dict[str, Any]:
    """Right answers of the built-in model's exam, with the 95 % interval."""
    items = list(held_out(job.exam))
    with Pipeline.load(job.bundle, job.engine, vision_feature_cache=1, opening=opening()) as pipe:
        right = sum(
            is_right(pipe.generate(one.image, one.prompt, max_new_tokens=ANSWER_TOKENS).text, one.answer)
            for one in items
        )
    return {"note": "", "right": right, "questions": len(items), "interval": list(wilson(right, len(items)))}


def engines(job: Job, device: Device) -> dict[str, Any]:
    """Build the bundle's TensorRT engines where there are none yet; hold them against ONNX Runtime."""
    bundle, machine = open_bundle(job.bundle), look()
    folder = engines_folder(bundle)
    made = compare_bundle(bundle, job.engine, build_bundle(bundle, job.engine, folder), machine)
    gates = {one.file: one.engine.stamp.gate for one in made}
    failed = [
        f"{file}: {gate.get('note', 'not compared')}"
        for file, gate in gates.items()
        if not gate.get("passed")
    ]
    seconds = {one.file: round(one.seconds, 1) for one in made}
    return {"note": "; ".join(failed), "gates": gates, "seconds": seconds}


def cuda_graph(job: Job, device: Device) -> dict[str, Any]:
    """Single steps replayed as a CUDA graph against plain ones: same tokens, milliseconds of both.

    On another engine both are plain.
    """
    items = list(held_out(max(2, job.questions // 10)))
    plain, graphed = (
        _answers(job.bundle, job.engine, items, recorded=recorded) for recorded in (False, True)
    )
    compared = compare(graphed, plain)
    ms = {}
    for name, recorded in (("plain", False), ("graph", True)):
        with closing(Opened(job.bundle, job.engine, cuda_graph=recorded)) as opened:
            values = opened.prefill(items[0])
            _steps(opened, values, WARM_UPS, device)
            values = opened.prefill(items[0])
            ms[name] = spread(_steps(opened, values, job.steps, device))
    return {"note": compared["note"], "against": {"plain steps": compared}, "ms": ms}


# In this order: `times` first, since on the CPU peak memory is the process's and only ever grows.
CHECKS: dict[str, Callable[[Job, Device], dict[str, Any]]] = {
    "engines": engines,
    "times": times,
    "nodes": nodes,
    "cache": cache,
    "agreement": agreement,
    "accuracy": accuracy,
    "cuda_graph": cuda_graph,
}


def checks_for(engine: str) -> list[str]:
    """Names of the checks that an engine takes: ONNX Runtime builds nothing, TensorRT has no providers."""
    left_out = ("nodes", "cuda_graph") if capabilities(engine).built else ("engines",)
    return [name for name in CHECKS if name not in left_out]
