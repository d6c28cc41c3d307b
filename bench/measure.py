"""Measures one bundle in a process of its own: every stage, every token, memory, and the machine beside it.

    python -m vtp.bench.measure TASK.json RESULT.json      what vtp-bench starts

A process of its own, so that peak memory is the bundle's and nothing else disturbs it. The machine's limits
are measured between the runs, so that a slow moment meets both.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtp.bench.common import flops
from vtp.bench.common.ceiling import Ceiling, open_ceilings
from vtp.bench.common.energy import Meter
from vtp.bench.common.figures import spread
from vtp.bench.common.resident import peak_resident, resident
from vtp.engines import UsageError, VtpError, capabilities
from vtp.engines.child import python_command
from vtp.engines.ort import session as ort
from vtp.export.patched import patched
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.bundle.memory import bundle_memory, kv_bytes, state_bytes
from vtp.runtime.engine_choice import choose_engines
from vtp.runtime.result import Result
from vtp.runtime.stages.runner import StageRunner
from vtp.runtime.stages.stage import Stage

WARM_UPS = 2
_ERRORS = {VtpError.exit_code: VtpError, UsageError.exit_code: UsageError}


@dataclass(frozen=True)
class Task:
    """What to measure: vtp-bench's flags."""

    bundle: str
    image: str
    prompt: str
    keep: int | None = None
    engine: str = "auto"
    threads: int | None = None
    max_new_tokens: int = 32
    repeats: int = 10
    small_ceilings: bool = False  # for tests


@dataclass
class Clock:
    """Seconds inside the engine's runs, and what the clock showed when decoding began."""

    seconds: float = 0.0
    at_decode: float | None = None


@dataclass
class Shapes:
    """Sizes of every prefill run's inputs: stage name -> (file, input -> shape), noted while it ran.

    seen  the last run of each stage; runs: all of them, in order
    """

    seen: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = field(default_factory=dict)
    runs: list[tuple[str, str, dict[str, tuple[int, ...]]]] = field(default_factory=list)


def measure(task: Task) -> dict[str, Any]:
    """All figures of one bundle; see `vtp.bench.cli` for what they mean. Raises VtpError, UsageError."""
    bundle = endless(open_bundle(task.bundle))
    chosen = choose_engines(bundle, task.engine, threads=task.threads)
    choice = chosen.choice
    before = resident()  # with the engine's library, without any graph
    started = time.perf_counter()
    with ExitStack() as stack:
        pipe = stack.enter_context(Pipeline(bundle, chosen, task.threads))
        opened_ms = (time.perf_counter() - started) * 1e3
        shapes = Shapes()
        for _ in range(WARM_UPS):
            with noting(shapes):
                answer = _ask(pipe, task)
        peak = peak_resident()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        dtype = "float32" if capabilities(choice.engine).widens_float16 else bundle.manifest.dtype
        limits = open_ceilings(folder, choice.engine, task.threads, dtype, task.small_ceilings)
        for limit in limits:
            limit.run()
        seen = _repeat(pipe, task, limits)
        keep = answer.visual_tokens.after
    return {
        "engine": choice.engine,
        "engines": pipe.engines,
        "keep": keep,
        "visual_tokens": answer.visual_tokens._asdict(),
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.token_ids),
        "open_ms": opened_ms,
        **_figures(bundle, keep, shapes, seen, choice.engine),
        "memory": _memory(bundle, choice.engine, before, peak),
        "energy": seen["energy"],
    }


def endless(bundle: Bundle) -> Bundle:
    """The bundle without end-of-sequence ids, so that every run makes as many tokens as asked for."""
    text = dataclasses.replace(bundle.manifest.text, eos_token_ids=())
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, text=text))


def _ask(pipe: Pipeline, task: Task) -> Result:
    return pipe.generate(task.image, task.prompt, keep_tokens=task.keep, max_new_tokens=task.max_new_tokens)


@contextmanager
def noting(shapes: Shapes) -> Iterator[None]:
    """Note the shapes that go into every stage run outside of decoding."""
    run = Stage.run

    def noted(stage: Stage, values: dict[str, Any], *more: Any) -> None:
        given = {name: values[source].shape for name, source in stage.info.inputs.items()}
        shapes.seen[stage.info.name] = stage.info.file, given
        shapes.runs.append((stage.info.name, stage.info.file, given))
        run(stage, values, *more)

    with patched(Stage, "run", noted):
        yield


@contextmanager
def _timing(clock: Clock) -> Iterator[None]:
    """Count the time inside ONNX Runtime; what is left of a run is the host's. Other engines count none."""
    run, step = ort._run, StageRunner.step

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        run(*arguments)
        clock.seconds += time.perf_counter() - start

    def stepping(runner: StageRunner, *arguments: Any) -> Any:
        if clock.at_decode is None:
            clock.at_decode = clock.seconds
        return step(runner, *arguments)

    with patched(ort, "_run", timed), patched(StageRunner, "step", stepping):
        yield


def _repeat(pipe: Pipeline, task: Task, limits: Sequence[Ceiling]) -> dict[str, Any]:
    """Run everything in turn, `repeats` times; lists of milliseconds and of rates."""
    stages: dict[str, list[float]] = {}
    lists: dict[str, list[float]] = {name: [] for name in ("ttft", "tpot", "host", "host_token")}
    rates: dict[tuple[str, str], list[float]] = {}
    with Meter() as meter:
        for _ in range(task.repeats):
            for limit in limits:
                rates.setdefault((limit.kind, limit.name), []).append(limit.work / limit.run())
            clock = Clock()
            with meter.counting(), _timing(clock):
                result = _ask(pipe, task)
            _note(result, clock, stages, lists)
    return {"stages": stages, **lists, "rates": rates, "energy": meter.report()}


def _note(
    result: Result, clock: Clock, stages: dict[str, list[float]], lists: dict[str, list[float]]
) -> None:
    timings, further = result.timings, len(result.token_ids) - 1
    for name, ms in timings.stages.items():
        stages.setdefault(name, []).append(ms)
    lists["ttft"].append(timings.ttft)
    if further > 0:
        lists["tpot"].append(timings.tpot)
    if not clock.seconds:  # another engine than ONNX Runtime ran
        return
    first = clock.seconds if clock.at_decode is None else clock.at_decode
    lists["host"].append(timings.ttft - timings.stages["preprocess"] - first * 1e3)
    if further > 0:
        lists["host_token"].append(timings.tpot - (clock.seconds - first) * 1e3 / further)


def _figures(
    bundle: Bundle, keep: int, shapes: Shapes, seen: Mapping[str, Any], engine: str
) -> dict[str, Any]:
    """Medians and quartiles of what was seen, with each stage's work beside the machine's best rates."""
    gemm, memory = (_best(seen["rates"], kind) for kind in ("gemm", "memory"))
    stages = [
        {
            "stage": name,
            "part": part_of(bundle.manifest, name),
            "ms": spread(values),
            **_stage_work(bundle, shapes, name, spread(values)["median"], gemm["median"]),
        }
        for name, values in seen["stages"].items()
    ]
    known = zip(*seen["stages"].values(), strict=True)
    other = [ttft - sum(parts) for ttft, parts in zip(seen["ttft"], known, strict=True)]
    stages.append({"stage": "other", "part": "host", "ms": spread(other), "flops": 0})
    tpot = seen["tpot"]
    return {
        "stages": stages,
        "parts": _parts(stages),
        "ttft_ms": spread(seen["ttft"]),
        "tpot_ms": spread(tpot),
        "tokens_per_s": spread([1e3 / ms for ms in tpot]),
        "host_ms": {"request": spread(seen["host"]), "token": spread(seen["host_token"])},
        "ceiling": {"gemm": gemm, "memory": memory},
        "decode": _decode(bundle, keep, shapes, tpot, memory["median"], engine),
    }


def _best(rates: Mapping[tuple[str, str], list[float]], kind: str) -> dict[str, Any]:
    """The fastest of the graphs of one kind, by its median."""
    found = [{"graph": name, **spread(values)} for (one, name), values in rates.items() if one == kind]
    return max(found, key=lambda entry: entry["median"])


def part_of(manifest: Manifest, stage: str) -> str:
    """Which of preprocess, encoder, pruner and prefill a stage belongs to; host for the rest."""
    if stage == "preprocess":
        return "preprocess"
    known = [info for info in manifest.stages if info.name == stage]
    if any(info.role == "pruner" for info in known):
        return "pruner"
    moments = {info.when for info in known}
    return "encoder" if "image" in moments else "prefill" if "prefill" in moments else "host"


def _parts(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum of the stages' medians by part, in milliseconds."""
    parts = dict.fromkeys(("preprocess", "encoder", "pruner", "prefill", "host"), 0.0)
    for stage in stages:
        parts[stage["part"]] += stage["ms"]["median"]
    return parts


def _stage_work(bundle: Bundle, shapes: Shapes, name: str, ms: float, gemm: float) -> dict[str, Any]:
    if name not in shapes.seen:
        return {"flops": 0}
    file, given = shapes.seen[name]
    work = flops.count(bundle.path(file), axes_of(bundle.manifest, file, given))
    rate = work.total / (ms / 1e3)
    return {"flops": work.total, "unknown": work.unknown, "flops_per_s": rate, "share": rate / gemm}


def axes_of(manifest: Manifest, file: str, given: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Sizes of a graph's named axes, from the shapes that went in."""
    graph = manifest.graphs[file]
    axes = {"batch": 1, **({"capacity": graph.kv.capacity} if graph.kv else {})}
    for name, shape in given.items():
        for axis, size in zip(graph.inputs[name].shape, shape, strict=True):
            if isinstance(axis, str):
                axes[axis] = size
    return axes


def _decode(
    bundle: Bundle, keep: int, shapes: Shapes, tpot: Sequence[float], memory: float, engine: str
) -> dict[str, Any]:
    """Operations and bytes of one step, and what of the memory's rate that is."""
    graphs = bundle.manifest.graphs
    past = {
        graphs[file].cache_of or file: given["position_ids"][1]
        for file, given in shapes.seen.values()
        if "position_ids" in given
    }
    read, work = step_work(bundle, keep, past, engine)
    if not tpot:
        return {"bytes": read, "flops": work}
    rate = read / (spread(tpot)["median"] / 1e3)
    return {"bytes": read, "flops": work, "bytes_per_s": rate, "share": rate / memory}


def step_work(bundle: Bundle, keep: int, past: Mapping[str, int], engine: str) -> tuple[int, int]:
    """Bytes that one step reads (weights, keys, values) and its operations.

    past  decoder graph -> tokens in its cache
    """
    manifest, read, work = bundle.manifest, 0, 0
    for info in manifest.stages_for("step", keep):
        graph = manifest.graphs[info.file]
        sizes = {axis: 1 for shape in graph.inputs.values() for axis in shape.shape if isinstance(axis, str)}
        held = 0
        if graph.kv is not None:
            held = past[info.file]
            sizes["capacity"] = graph.kv.capacity
            read += kv_bytes(graph) // graph.kv.capacity * held + state_bytes(graph)
        found = flops.count(bundle.path(info.file), sizes, held)
        widened = 2 if capabilities(engine).widens_float16 and manifest.dtype == "float16" else 1
        read, work = read + found.weights * widened, work + found.total
    return read, work


def _memory(bundle: Bundle, engine: str, before: int, peak: int) -> dict[str, Any]:
    """Bytes: as told by the manifest and the graphs, and as it came out."""
    told = bundle_memory(bundle, engine)
    weights = sum(info.bytes for name, info in bundle.manifest.files.items() if name.endswith(".data"))
    cache = sum(stage.cache for stage in told.stages)
    return {
        "weights": weights,
        "kv": cache,
        "activations": max(stage.activations for stage in told.stages),
        "process": before,
        "peak": peak,
        "over": (peak - before) / (weights + cache) - 1 if peak and weights + cache else None,
    }


def in_child(task: Task) -> dict[str, Any]:
    """`measure` in a process of its own. Raises what it raises; VtpError when the process was killed."""
    with tempfile.TemporaryDirectory() as folder:
        told, answer = Path(folder) / "task.json", Path(folder) / "result.json"
        told.write_text(json.dumps(dataclasses.asdict(task)))
        # What a library prints would land in the table on standard output.
        command = python_command("vtp.bench.measure", str(told), str(answer))
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        if not answer.exists():
            how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"left with {code}"
            raise VtpError(f"the process that measured {task.bundle} {how}")
        found = json.loads(answer.read_text())
    if "error" in found:
        raise _ERRORS[found["code"]](found["error"])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a task file; an error is written as the result."""
    told, answer = map(Path, sys.argv[1:] if arguments is None else arguments)
    try:
        found = measure(Task(**json.loads(told.read_text())))
    except VtpError as error:
        found = {"error": str(error), "code": error.exit_code}
    answer.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
