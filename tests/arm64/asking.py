"""Answers of bundles with whatever machine and versions run this file: a line and a JSON file for each.

    python -m tests.arm64.asking JOBS.json

One process walks through all bundles, since to start one under qemu is slow; those whose file is there
already, of the same bundle and questions, are left out. Imports what the runtime needs and nothing else.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines import VtpError
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.media.images import load_image
from vtp.runtime.parity_gate import Case, cases
from vtp.runtime.result import Result
from vtp.runtime.scheduler import Scheduler
from vtp.serve.streams import Watcher, open_source

ENGINE, SLOTS, ALTERNATIVES = "ort-cpu", 3, 8
PACKAGES = ("onnxruntime", "numpy", "tokenizers", "pillow", "jinja2")


@dataclass(frozen=True)
class Job:
    """One bundle and what it is asked.

    file       where the answers go
    stamp      of bundle, sources and questions: answers with another one are not these
    questions  {"by": "generate", "scheduler" or "watcher", "picture", "prompt", "options"}
    frames     the watcher's folder; its questions are about its files, in order
    wanted     answers of the other machine; where other tokens are kept here, what the pruners were given and
               chose is written beside `file`, as it is without `wanted`
    """

    folder: str
    file: str
    stamp: str
    questions: list[dict[str, Any]]
    frames: str
    wanted: str | None = None

    @property
    def done(self) -> bool:
        """Whether the answers are there."""
        return read(self.file).get("stamp") == self.stamp


def read(file: str | None) -> dict[str, Any]:
    """A file of answers; {} if there is none."""
    path = Path(file) if file else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}


def main() -> int:
    """See the module's words."""
    jobs = [Job(**one) for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    todo = [job for job in jobs if not job.done]
    warnings.filterwarnings("ignore", ".* is cut off", UserWarning)  # of the oblong pictures
    machine = f"{platform.machine()}, Python {platform.python_version()}, {versions()}"
    print(f"{machine}: {len(todo)} bundles to ask, {len(jobs) - len(todo)} answered already", flush=True)
    for job in todo:
        began = time.monotonic()
        found = ask(job)
        whole = json.dumps({**found, "stamp": job.stamp, "machine": machine})
        part = Path(job.file).with_suffix(".part")
        part.write_text(whole, encoding="utf-8")
        part.replace(job.file)
        print(f"asked  {Path(job.folder).name}  {time.monotonic() - began:.0f} s", flush=True)
    return 0


def versions() -> str:
    """Of what the runtime stands on."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)


def ask(job: Job) -> dict[str, Any]:
    """All answers of one bundle; {"error": ...} if it does not answer."""
    try:
        found = answers(job)
        wanted = read(job.wanted).get("answers")
        for at, answer in enumerate(found["answers"]):
            if wanted is None or answer["kept"] != wanted[at]["kept"]:
                save_choices(job, at)
        return found
    except VtpError as error:
        return {"error": str(error)}


def answers(job: Job) -> dict[str, Any]:
    """Of each question, in their order, and how many rows the scheduler's steps had."""
    by: dict[str, Iterator[Result]] = {}
    rows = None
    with Pipeline.load(job.folder, ENGINE, threads=1) as pipe:
        by["generate"] = iter([_generate(pipe, one) for one in of(job, "generate")])
        if asked := of(job, "scheduler"):
            results, rows = _schedule(pipe, asked)
            by["scheduler"] = iter(results)
        if asked := of(job, "watcher"):
            by["watcher"] = iter(_watch(pipe, job.frames, asked))
    found = [record(next(by[one["by"]])) for one in job.questions]
    return {"answers": found, "rows": rows}


def of(job: Job, by: str) -> list[dict[str, Any]]:
    """The questions that one part is asked."""
    return [one for one in job.questions if one["by"] == by]


def _generate(pipe: Pipeline, asked: dict[str, Any]) -> Result:
    return pipe.generate(asked["picture"], asked["prompt"], logprobs=ALTERNATIVES, **asked["options"])


def _schedule(pipe: Pipeline, asked: list[dict[str, Any]]) -> tuple[list[Result], list[int]]:
    """All at once; with steps and the rows in them."""
    with Scheduler(pipe, slots=SLOTS) as scheduler:
        tickets = [
            scheduler.submit(one["picture"], one["prompt"], logprobs=ALTERNATIVES, **one["options"])
            for one in asked
        ]
        results = [ticket.result() for ticket in tickets]
        stats = scheduler.stats()
    return results, [stats.steps, stats.stepped_rows]


def _watch(pipe: Pipeline, folder: str, asked: list[dict[str, Any]]) -> list[Result]:
    """One standing question about every picture of a folder."""
    source = open_source(folder, every_frame=True)
    options = {"logprobs": ALTERNATIVES, **asked[0]["options"]}
    with Watcher(pipe, source, asked[0]["prompt"], every_frame=True, **options) as watcher:
        told = [answer.result for answer in watcher]
    assert len(told) == len(asked) and None not in told, f"{len(told)} answers about {len(asked)} frames"
    return told  # type: ignore[return-value]


def record(result: Result) -> dict[str, Any]:
    """What is compared; `likely` are the most likely tokens at each place of the text: [id, logprob]."""
    likely = [[[other.id, other.logprob] for other in one.top] for one in result.logprobs or []]
    kept = result.then["kept"] if result.then else result.kept  # after the second cut, where there is one
    return {"tokens": result.token_ids, "text": result.text, "kept": kept, "likely": likely}


# -- what pruners are given ----------------------------------------------------------------------------------


def choices(folder: str, picture: str, prompt: str) -> list[Case]:
    """One run of every pruner's graph, on what the bundle computes here."""
    walk = cases(open_bundle(folder), load_image(Path(picture)), prompt)
    return [case for case in walk if "keep_indices" in case.outputs]


def save_choices(job: Job, at: int) -> None:
    """What each pruner was given and chose at one question, beside the answers."""
    asked = job.questions[at]
    for old in Path(job.file).parent.glob(choice_file(job.file, at, "*").name):
        old.unlink()
    for number, case in enumerate(choices(job.folder, asked["picture"], asked["prompt"])):
        arrays = {f"in {name}": array for name, array in case.feeds.items()}
        np.savez(
            choice_file(job.file, at, number), graph=case.file, out=case.outputs["keep_indices"], **arrays
        )


def choice_file(file: str, at: int, number: int | str) -> Path:
    """Where the choice of a bundle's pruner lies: question `at`, its stage `number`."""
    return Path(file).with_name(f"{Path(file).stem}-{at}-{number}.npz")


if __name__ == "__main__":
    sys.exit(main())
