"""vtp-bench --engines: every graph of a bundle on every engine that can run it, and who is to run which.

A picture and a prompt go through the bundle on ONNX Runtime; each engine gets what each graph got, must give
what it gave, and is then timed on it, the engines in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from vtp.engines import Binding, Choice, Engine, Value, VtpError, judge_engines
from vtp.engines import capabilities as able
from vtp.runtime import Pipeline
from vtp.runtime.bundle.caches import present_of
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.compare import compare
from vtp.runtime.engine_choice import StageEngines
from vtp.runtime.example_input import sample_for
from vtp.runtime.opening import open_stage
from vtp.runtime.parity_gate import Case, cases

BASE = "ort-cpu"
WARM_UPS = 2
GAIN = 0.95  # of the base engine's time: what saves less is not worth another library's memory
_PROMPTS, _TOKENS = ["what is in the picture ?", "where ?"], 8


@dataclass
class Measured:
    """One graph: engine -> milliseconds of an answer, or why that engine is out; and who is to run it."""

    file: str
    ms: dict[str, float] = field(default_factory=dict)
    out: dict[str, str] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        """The fastest of those that gave the right answers; the base engine unless that saves something."""
        within = {name: spent for name, spent in self.ms.items() if name not in self.out}
        best = min(within, key=lambda name: within[name], default=BASE)
        base = within.get(BASE)
        return best if base is None or within[best] < GAIN * base else BASE

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return {**asdict(self), "engine": self.engine}


def candidates(bundle: Bundle) -> list[str]:
    """Engines that run here, whose values the others can read."""
    judged = judge_engines(bundle.manifest.dtype, target=bundle.manifest.target)
    accepted = [one.engine for one in judged if one.accepted]
    return [name for name in accepted if able(name).on_cpu and able(name).proven and not able(name).built]


def measure_engines(
    bundle: Bundle,
    engines: Sequence[str],
    threads: int | None,
    repeats: int,
    tokens: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Hold every engine against ONNX Runtime on every graph, and time it.

    repeats  timed runs of a graph on each engine, in turns, after two to warm up: the median counts
    tokens   of an answer: a step counts once for each but the first, all else once
    """
    found: dict[str, Measured] = {}
    for case in cases(bundle):
        say(f"measure {case.file}")
        steps = tokens - 1 if case.when == "step" else 1
        one = found.setdefault(case.file, Measured(case.file))
        for name, spent in _times(bundle, case, engines, threads, repeats, one.out).items():
            one.ms[name] = one.ms.get(name, 0.0) + steps * spent
    return list(found.values())


def disagreement(bundle: Bundle, chosen: Mapping[str, str], threads: int | None) -> str:
    """What a batch of two prompts is answered otherwise on the chosen engines; "" if nothing.

    Single prompts are held against each other graph by graph; libraries have other kernels for batches.
    """
    picture, answers = sample_for(bundle.manifest.image), []
    for elsewhere in ({}, {file: name for file, name in chosen.items() if name != BASE}):
        with Pipeline(bundle, StageEngines(Choice(BASE), elsewhere), threads) as pipe:
            count = min(len(_PROMPTS), pipe.batch_size)
            found = pipe.generate_batch([picture] * count, _PROMPTS[:count], max_new_tokens=_TOKENS)
            answers.append([(one.token_ids, one.kept) for one in found])
    return "" if answers[0] == answers[1] else "two prompts together are answered otherwise"


def _times(
    bundle: Bundle,
    case: Case,
    engines: Iterable[str],
    threads: int | None,
    repeats: int,
    out: dict[str, str],
) -> dict[str, float]:
    """Milliseconds of one run, the median of each engine that runs the case; `out` is told of the others."""
    taken: dict[str, list[float]] = {}
    with ExitStack() as stack:
        bound: dict[str, Binding] = {}
        for name in engines:
            try:
                engine = stack.enter_context(closing(open_stage(bundle, case.file, name, threads)))
                bound[name] = _bind(engine, case)
                bound[name].run()
                why = _differs(case, bound[name].outputs, limits_for(bundle))
            except VtpError as error:
                why = str(error)
            if why:
                out.setdefault(name, why)
        for turn in range(WARM_UPS + repeats):
            for name, binding in bound.items():
                start = time.perf_counter()
                binding.run()
                if turn >= WARM_UPS:
                    taken.setdefault(name, []).append((time.perf_counter() - start) * 1e3)
    return {name: median(times) for name, times in taken.items()}


def _bind(engine: Engine, case: Case) -> Binding:
    """Inputs and outputs in place, the cache in one, as a pipeline has it."""
    feeds = {name: engine.put(array) for name, array in case.feeds.items()}
    into: dict[str, Value] = {}
    pasts = {present_of(name): value for name, value in feeds.items()}
    for name, array in case.outputs.items():
        into[name] = pasts.get(name) or engine.zeros(array.shape, str(array.dtype))
    return engine.bind(feeds, into)


def limits_for(bundle: Bundle) -> str:
    """The row of the comparator's table that holds two engines of a bundle's bits against each other."""
    manifest = bundle.manifest
    if manifest.quantization:
        return "int4"
    return "float16 kernels" if manifest.dtype == "float16" else "float32"


def _differs(case: Case, given: Mapping[str, Value], limits: str) -> str:
    """What an engine gave otherwise than ONNX Runtime, in a line; "" if nothing."""
    for name, wanted in case.outputs.items():
        mine = given[name].numpy()
        if name.startswith("present."):  # beyond its length a cache holds anything
            mine, wanted = mine[..., : case.length, :], wanted[..., : case.length, :]
        result = compare(mine, wanted, limits)
        if not result.ok:
            return f"{name} is not {BASE}'s: {result.why}"
    return ""


def table_of(measured: Sequence[Measured], engines: Sequence[str]) -> list[list[str]]:
    """Rows for people: graph, milliseconds of an answer on each engine, who runs it."""
    return [
        [one.file, *(_cell(one, name) for name in engines), one.engine]
        for one in sorted(measured, key=lambda one: -max(one.ms.values(), default=0.0))
    ]


def _cell(one: Measured, name: str) -> str:
    return "out" if name in one.out else f"{one.ms[name]:.2f}"


def saved_share(measured: Sequence[Measured]) -> float:
    """How much of the base engine's time the choice saves, over all graphs that both ran."""
    both = [one for one in measured if BASE in one.ms]
    base = sum(one.ms[BASE] for one in both)
    return 1 - sum(one.ms[one.engine] for one in both) / base if np.isfinite(base) and base else 0.0
