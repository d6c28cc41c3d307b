"""A bundle before a video that plays in real time: answers a second, how old frames are, where time goes.

What a camera of that rate and size would meet. Answers end where they end, as in vtp-watch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from vtp.bench.common.figures import spread
from vtp.bench.common.resident import peak_resident, resident
from vtp.bench.measure import Task, part_of
from vtp.engines import UsageError, VtpError
from vtp.engines.errors import shown
from vtp.runtime import Pipeline
from vtp.runtime.commands.console import table
from vtp.serve.streams.sinks.tally import Tally
from vtp.serve.streams.sources.names import source_name
from vtp.serve.streams.sources.opening import open_source
from vtp.serve.streams.watcher import Watcher


def check_file(text: str) -> None:
    """Raise UsageError for what is not a file; of a URL the message shows no password."""
    if not Path(text).is_file():
        raise UsageError(f"--video '{source_name(text)}' is not a file; give a video")


def measure_video(task: Task) -> dict[str, Any]:
    """Play the task's `image`, a video, once, and ask about the newest frame again and again.

    Raises VtpError and UsageError.
    """
    check_file(task.image)
    with Pipeline.load(task.bundle, task.engine, task.threads) as pipe:
        pipe.warmup()
        stages: dict[str, list[float]] = {}
        ttft: list[float] = []
        before = resident()
        with closing(open_source(task.image)) as source:
            options = {"keep_tokens": task.keep, "max_new_tokens": task.max_new_tokens}
            with Watcher(pipe, source, task.prompt, **options) as watcher:  # type: ignore[arg-type]
                tally, tokens = Tally(watcher), None
                for answer in watcher:
                    tally.add(answer)
                    tokens = answer.visual_tokens._asdict()
                    for name, ms in answer.result.timings.stages.items() if answer.result else ():
                        stages.setdefault(name, []).append(ms)
                    ttft.append(answer.stages["ttft"])
        if tokens is None:
            raise VtpError(f"{source.name} gave no frame that could be asked about; give a longer video")
        return {
            "engine": pipe.engine,
            "engines": pipe.engines,
            "visual_tokens": tokens,
            "stages": [
                {"stage": name, "part": part_of(pipe.manifest, name), "ms": spread(values)}
                for name, values in stages.items()
            ],
            "ttft_ms": spread(ttft),
            "watch": tally.to_json(),
            "memory": {"before": before, "after": resident(), "peak": peak_resident()},
        }


def render(results: Mapping[str, Any]) -> str:
    """The page that a terminal shows."""
    watch, tokens, ttft = results["watch"], results["visual_tokens"], results["ttft_ms"]
    rows = [
        [
            "frames a second",
            f"{watch['source_fps']:.1f}",
            f"{watch['seen']} came in {watch['seconds']:.1f} s",
        ],
        ["answers a second", f"{watch['fps']:.2f}", f"{watch['asked']} asked, {watch['dropped']} dropped"],
        _ages("age when asked, ms", watch["asked_age_ms"]),
        _ages("age at the answer, ms", watch["age_ms"]),
        ["visual tokens", f"{tokens['after']}", f"of {tokens['before']}"],
        ["first token, ms", f"{ttft['median']:.1f}", f"{ttft['low']:.1f} to {ttft['high']:.1f}"],
    ]
    stages = [
        [
            one["stage"],
            one["part"],
            f"{one['ms']['median']:.2f}",
            f"{one['ms']['low']:.2f} to {one['ms']['high']:.2f}",
        ]
        for one in results["stages"]
    ]
    memory = [results["memory"][name] / 1e6 for name in ("before", "after")]
    return "\n".join(
        [
            _head(results),
            "",
            table(["of the whole video", "", ""], rows),
            "",
            table(["stage", "part", "ms", "quartiles"], stages),
            "",
            f"memory, MB: {memory[0]:.0f} before the first frame, {memory[1]:.0f} after the last",
        ]
    )


def _head(results: Mapping[str, Any]) -> str:
    bundle, machine, settings = results["bundle"], results["machine"], results["settings"]
    return (
        f"{shown(bundle['name'])}: {shown(bundle['method'])}, {shown(bundle['dtype'])}, {results['engine']}, "
        f"{settings['threads']} threads\n{machine['processor']}, {machine['cores']} cores; "
        f"{machine['time']}\n{shown(settings['video'])}, in real time"
    )


def _ages(name: str, ages: Mapping[str, float]) -> list[str]:
    return [name, f"{ages['p50']:.0f}", f"p95 {ages['p95']:.0f}, at most {ages['max']:.0f}"]
