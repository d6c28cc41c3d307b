"""make test-arm64: bundles of the built-in model answer on arm64 Python, under qemu, as they do on x86-64.

    python -m tests.arm64 [WORD ...]

Runtime, watcher and scheduler with aarch64 wheels in build/arm64: the same tokens and the same kept ones, or
those that differ with their margins. A line for each answer that differs, a table at the end; exit code 1
where anything differs that is no close call. WORD selects bundles: see `bundles.select`; the word "commands",
or none, asks one by vtp-watch and vtp-serve as well. A run that was ended goes on where it stood.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vtp.export.cli import quiet_libraries

from . import commands
from .asking import Job, read
from .bundles import STREAMED, Case, digest, save_pictures, select
from .closeness import closeness_file
from .environment import BUILD, ROOT, on_arm64, on_host, pins, prepare, prepare_commands, refusal
from .margins import Outcome, compare

ASKED, WATCHED = 2, 2  # pictures
TOKENS = 12
_SOURCES = ("engines", "runtime", "serve/streams", "tests/arm64/asking.py")
HOST, ARM64 = "x86-64", "arm64"
COMMANDS, COMMANDS_ASK = "commands", "vispruner-ort-float32"


def main() -> int:
    """See the module's words."""
    if why := refusal():
        print(why, file=sys.stderr)
        return 2
    words = sys.argv[1:]
    bundles_of = [word for word in words if word != COMMANDS]
    chosen = [] if words and not bundles_of else select(bundles_of)
    quiet_libraries()
    prepare()
    wrong = ask_bundles(chosen) if chosen else 0
    return max(wrong, ask_commands()) if not words or COMMANDS in words else wrong


def ask_commands() -> int:
    """One bundle by the commands; 1 if an answer differs."""
    prepare_commands()
    (case,) = select([COMMANDS_ASK])
    return commands.check(case.make(BUILD / "bundles"))


def ask_bundles(chosen: list[Case]) -> int:
    """All by the pipeline, some by scheduler and watcher; 1 if an answer differs by no close call."""
    sources = digest(ROOT / one for one in _SOURCES)
    bundles = [case.make(BUILD / "bundles") for case in chosen]
    host, arm64 = (jobs(where, chosen, bundles, sources) for where in (HOST, ARM64))
    on_host("-m", "tests.arm64.asking", write(HOST, host))
    on_arm64("-m", "tests.arm64.asking", write(ARM64, arm64))
    on_host("-m", "tests.arm64.closeness", BUILD / f"{ARM64}.json")
    return report(chosen, arm64)


def questions(case: Case) -> list[dict[str, Any]]:
    """Of the exam; the scheduler's are sampled in part, so that answers are long enough to share steps."""
    pictures = [(str(path), item.prompt) for path, item in save_pictures(BUILD / "pictures", ASKED)]
    greedy = {"max_new_tokens": TOKENS}

    def asked(by: str, picture: str, prompt: str, **options: Any) -> dict[str, Any]:
        return {"by": by, "picture": picture, "prompt": prompt, "options": {**greedy, **options}}

    found = [asked("generate", *one) for one in pictures]
    if case.name in STREAMED:
        prompts = [*pictures, (pictures[0][0], "how many circle ?")]
        found += [asked("scheduler", *one, temperature=9.0, seed=at) for at, one in enumerate(prompts)]
        found += [asked("watcher", path, "what color is the star ?") for path, _ in pictures[:WATCHED]]
    return found


def jobs(where: str, chosen: list[Case], bundles: list[Path], sources: str) -> list[Job]:
    """What one machine is to do; arm64 knows where x86-64's answers lie."""
    made = []
    for case, bundle in zip(chosen, bundles, strict=True):
        asked = questions(case)
        parts = [(bundle / "manifest.json").read_text(encoding="utf-8"), json.dumps(asked), sources, *pins()]
        stamp = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        answers = {one: str(BUILD / "answers" / one / f"{case.name}.json") for one in (HOST, ARM64)}
        wanted = None if where == HOST else answers[HOST]
        made.append(Job(str(bundle), answers[where], stamp, asked, str(BUILD / "pictures"), wanted))
    return made


def write(where: str, todo: Iterable[Job]) -> Path:
    """The jobs as a file."""
    (BUILD / "answers" / where).mkdir(parents=True, exist_ok=True)
    file = BUILD / f"{where}.json"
    file.write_text(json.dumps([asdict(job) for job in todo]), encoding="utf-8")
    return file


def report(chosen: list[Case], todo: list[Job]) -> int:
    """A line for each bundle that differs and a table; 1 if any is wrong."""
    rows: dict[tuple[str, str], list[Outcome]] = {}
    for case, job in zip(chosen, todo, strict=True):
        found, wanted = read(job.file), read(job.wanted)
        outcome = compare(found, wanted, read(closeness_file(job.file)), case.weights)
        rows.setdefault((case.target, case.weights), []).append(outcome)
        for said, lines in (("close ", outcome.close), ("WRONG ", outcome.wrong)):
            for line in lines:
                print(f"{said} {case.name}: {line}")
    print(
        f"\n{'target':10}{'weights':10}bundles  answers  same  close  wrong  log-probabilities apart, at most"
    )
    total = Outcome()
    for (target, weights), outcomes in rows.items():
        both = Outcome()
        for outcome in outcomes:
            both.add(outcome)
        total.add(both)
        figures = f"{len(outcomes):7}{both.answers:9}{both.same:6}{len(both.close):7}{len(both.wrong):7}"
        print(f"{target:10}{weights:10}{figures}  {both.apart:.1e}")
    counts = f"{len(total.close)} close, {len(total.wrong)} wrong"
    print(f"{total.same} of {total.answers} answers the same, {counts}")
    return int(bool(total.wrong) or not total.answers)


if __name__ == "__main__":
    sys.exit(main())
