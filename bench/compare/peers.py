"""vtp beside what one would use instead: the same weights, picture and question, in one run, in turns.

    python -m vtp.bench.compare.peers [--shape llava-ov-0.5b | --model DIR] [--int8] [--int4]
    [--towers ipcv:0.35] [--also NAME=BUNDLE]

Every peer has a process of its own. Its first logits and tokens are held against the others' before anything
is timed; then it and vtp answer in turns, so that a slow moment of the machine meets both, and milliseconds
and ratio of the two come from these turns. With --int8 and --int4 everybody is held against vtp in as many
bits. What is not installed is named, with the line that installs it. A pair's turns are kept as they are
done (turns.jsonl in the work folder): the same command, with the same code, goes on from them.
Writes docs/bench.json, docs/bench.md and the README's figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.cli import PROMPT, stamp, whole
from vtp.bench.common.agreement import Answer, agreement, likeness
from vtp.bench.common.checkout import place
from vtp.bench.common.kept_turns import KeptTurns, Turns, code, identity
from vtp.bench.common.pairs import BASE, FLOAT, PRECISIONS, WHAT, Precision, fastest_of, pair_of, wanted
from vtp.bench.common.resident import peak_resident
from vtp.bench.common.towered import folder_of, split_name, towered
from vtp.bench.compare import peer
from vtp.bench.compare.llamacpp.built import how_built
from vtp.bench.compare.peer import Spec, missing
from vtp.bench.compare.peers_report import FORMAT, ROUNDS, write_report
from vtp.bench.compare.worker import Worker, prepare
from vtp.bench.measure import Task, in_child
from vtp.bench.shapes.cached_bundle import Wanted, check, run_export
from vtp.engines import UsageError, VtpError, registry
from vtp.engines.child import python_command
from vtp.engines.disk.files import free_disk
from vtp.engines.versions import installed_version
from vtp.export.cli import quiet_libraries
from vtp.runtime import pipeline
from vtp.runtime.bundle.folder import MANIFEST, open_bundle
from vtp.runtime.commands.arguments import add_debug, add_threads
from vtp.runtime.commands.console import Parser, Progress, run_command
from vtp.runtime.machine.facts import look
from vtp.scenes import examples_dir

# Whose answers are equal: of each line the first that has answered is the measure for the others.
EXACT = ("torch", "transformers-onnx", "openvino", FLOAT.whole)
LLAMACPP_ORDER = "torch-class-last"
INT4_DECODERS = ("genai-int4", "vtp decoder int4")
SAME = (EXACT, (BASE, "torch-vispruner"), ("genai", "vtp decoder"), INT4_DECODERS)
_FLOAT_BUNDLES = (BASE, FLOAT.whole, "vtp adaptprune")
_LIBRARIES = ("openvino", "nncf", "onnxruntime-genai", "gguf")
_DECODER_TOKENS = 16  # text tokens beside the kept ones, in the decoder-only comparison


class Aside(Exception):
    """A peer that cannot take part, and why; the others go on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 also where a peer is missing, for that is a result."""
    parser = Parser(prog="python -m vtp.bench.compare.peers", description="vtp beside its peers.")
    add = parser.add_argument
    add("--shape", default="llava-ov-0.5b", help="full-size shape, random weights (default: %(default)s)")
    add("--model", metavar="DIR", help="instead: a LLaVA in Hugging Face layout")
    add("--int8", action="store_true", help="also int8 encoders: vtp's and those of peers in as few bits")
    add("--int4", action="store_true", help="also int4 decoders: the same, and onnxruntime-genai's")
    add("--towers", help="also vtp with these tower reductions, such as ipcv:0.35,tome:16")
    add("--also", action="append", default=[], metavar="NAME=DIR", help="one more bundle of the same model")
    add("--peers", default="all", help="names, or all (default: %(default)s)")
    add("--keep", default="64", help="visual tokens kept (default: %(default)s)")
    add("--rounds", default=ROUNDS, help="turns of every pair (default: %(default)s)")
    add("--tokens", default="16", help="tokens of every answer (default: %(default)s)")
    add_threads(parser, "CPU threads of everybody (default: all cores)")
    add("--work", metavar="DIR", help="folder for models and bundles (default: build/bench of the checkout)")
    add(
        "--out",
        metavar="DIR",
        help="checkout whose docs/ and README are written (default: the current folder)",
    )
    add("--make-only", action="store_true", help="make models, bundles and graphs, and measure nothing yet")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("peers", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    quiet_libraries()
    out = place(args.out, "--out")
    contest = Contest(args, Progress())
    contest.make()
    if args.make_only:
        contest.progress.end()
        return
    contest.run()
    contest.progress.end()
    text = write_report(contest.results, out)
    print(text)
    print(f"\ndocs/bench.json, docs/bench.md and the README's figures written in {out}")


class Contest:
    """The peers, the pairs, and what came out of them."""

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        """Read the flags. Raises UsageError for bad ones."""
        self.progress = progress
        self.work = place(args.work, "--work", "build/bench") / (
            Path(args.model).name if args.model else args.shape
        )
        self.log = self.work / "peers.log"
        self.rounds, self.keep = whole("rounds", args.rounds), whole("keep", args.keep)
        self.wanted = Wanted(args.shape, "none", None, "float32", "ort-cpu", self.work)
        self.model = Path(args.model) if args.model else self.work / "model"
        self.precisions = wanted(args.int8, args.int4)
        self.towered = towered(args.towers, self.precisions)
        names = (*_FLOAT_BUNDLES, *dict.fromkeys(one.source for one in self.towered))
        self.bundles = {name: self.work / folder_of(name) for name in names}
        self.fewer = {
            name: (source, at)
            for at in self.precisions[1:]
            for name, source in ((at.ours, BASE), (at.whole, FLOAT.whole))
        }
        self.fewer |= {one.name: (one.source, one.at) for one in self.towered if one.name != one.source}
        self.extra = {name: self.work / folder_of(name) for name in self.fewer}
        self.also = {name: (folder, self._precision_of(folder)) for name, folder in map(_named, args.also)}
        self.extra |= {name: folder for name, (folder, _) in self.also.items()}
        self.chosen = _with_fewer_bits(_chosen(args.peers), self.precisions, args.int4)
        self.spec = Spec(
            model=str(self.model),
            work=str(self.work),
            image=str(examples_dir() / "scene.png"),
            prompt=PROMPT,
            tokens=whole("tokens", args.tokens),
            threads=whole("threads", args.threads) if args.threads else os.cpu_count() or 1,
            ids=_ids(self.keep + _DECODER_TOKENS),
            keep=self.keep,
        )
        self.shape = None if args.model else args.shape
        self.answers: dict[str, Answer] = {}
        self.results: dict[str, Any] = {
            "format": FORMAT,
            "model": self.shape or self.model.name,
            "keep": self.keep,
            "rounds": self.rounds,
            "tokens": self.spec.tokens,
            "threads": self.spec.threads,
            "towers": list(dict.fromkeys(one.tower for one in self.towered)),
            "decoder_tokens": len(self.spec.ids),
            "flags": _flags(args),
            "fewer_bits": {},
            "llamacpp": {},
            "machine": {},
            "peers": {},
            "pairs": [],
            "missing": {},
            "failed": {},
            "stages": {},
        }

    def make(self) -> None:
        """The model, the bundles, and what every peer opens; all is kept for the next time."""
        if self.shape:
            check(
                dataclasses.replace(self.wanted, shape=self.shape), look().memory.usable, free_disk(self.work)
            )
            if not self.model.exists():
                from vtp.bench.shapes.models import write_shape

                self.progress.step(f"make a {self.shape} with random weights")
                write_shape(self.shape, self.model, "float32")
        for name, folder in self.bundles.items():
            if not (folder / MANIFEST).exists():
                self.progress.step(f"export {name}")
                run_export(["--model", str(self.model), *self._export_flags(name), "-o", str(folder)])
        for name, (source, at) in self.fewer.items():
            self._quantise(name, source, at)
        for name in self.chosen:
            self._aside(name, lambda name=name: self._prepare(name))  # type: ignore[misc]

    def _export_flags(self, name: str) -> list[str]:
        """Of one of the float bundles."""
        plain, tower = split_name(name)
        method = plain.split()[1]
        keep = [] if method == "none" else ["--keep-tokens", str(self.keep)]
        return ["--method", method, *keep, *(["--tower", tower] if tower else [])]

    def run(self) -> None:
        """All pairs, then where vtp's own time goes."""
        self.results["machine"] = stamp()
        found = {name: version for name in _LIBRARIES if (version := installed_version(name))}
        self.results["machine"]["versions"] |= found
        settings = {name: self.results[name] for name in ("format", "rounds", "tokens", "threads")}
        settings |= {**self.results["machine"], "spec": dataclasses.asdict(self.spec)}
        settings["code"] = code(registry, pipeline, peer)
        self.kept = KeptTurns(self.work / "turns.jsonl", settings)
        for at in self.precisions:
            self._aside(at.ours, lambda at=at: self._at(at))  # type: ignore[misc]
        for name, at in {
            "vtp adaptprune": FLOAT,
            **{name: at for name, (_, at) in self.also.items()},
        }.items():
            self._beside_fastest(name, at)
        for one in self.towered:
            for theirs in one.beside(self.results):
                self._aside(one.name, lambda theirs=theirs, ours=one.name: self._pair(theirs, ours))  # type: ignore[misc]
        if self._able(("genai",)):
            self._aside("genai", lambda: self._pair("genai", "vtp decoder"))
        if self._able(("genai-int4",)):
            self._aside("genai-int4", lambda: self._pair(*INT4_DECODERS))
        if any(name.startswith("llamacpp") for name in self.results["peers"]):
            self.results["llamacpp"] = how_built(self.work / "llamacpp")
        measures = [at.ours for at in self.precisions]
        for name in (*measures, "vtp adaptprune", *self.also):
            self._aside(f"{name}, stages", lambda name=name: self._stages(name))  # type: ignore[misc]
        self.results["kept"] = {"pairs": self.kept.used, "begun": self.kept.begun}

    def _at(self, at: Precision) -> None:
        """Everybody of one precision in turns with vtp's pruned bundle, which stays open."""
        if LLAMACPP_ORDER not in self.answers and self._able(
            [n for n in at.peers if n.startswith("llamacpp")]
        ):
            self._aside(LLAMACPP_ORDER, self._note_order)
        with self._open(at.ours) as ours:
            self._note_answer(at.ours, ours)
            pruned = ("torch-vispruner",) if at is FLOAT else ()
            for name in [*self._able((*at.peers, *pruned)), at.whole]:
                self._aside(name, lambda name=name: self._pair(name, at.ours, ours))  # type: ignore[misc]

    def _note_order(self) -> None:
        """What llama.cpp's answers are held against."""
        if not missing(LLAMACPP_ORDER):
            with self._open(LLAMACPP_ORDER) as torch:
                self.answers[LLAMACPP_ORDER] = torch.run()["tokens"], torch.logits()

    def _beside_fastest(self, name: str, at: Precision) -> None:
        """A further bundle of vtp's, in turns with the fastest peer and with vtp unpruned in as many bits."""
        for theirs in (fastest_of(self.results, at), at.whole):
            if theirs is not None:
                self._aside(name, lambda theirs=theirs: self._pair(theirs, name))  # type: ignore[misc]

    def _precision_of(self, folder: Path) -> Precision:
        """The precision of a bundle, which must be one of this run's, for it needs peers in as many bits."""
        record = open_bundle(folder).manifest.quantization
        flags = (record.get("vision", "none"), record.get("decoder", "none"))
        found = next((at for at in self.precisions if at.flags == flags), None)
        if found is None:
            raise UsageError(
                f"--also {folder} has its encoder in {flags[0]}, its decoder in {flags[1]} (none: float32); "
                "this run has no peers in as many bits: give --int8, --int4 or both accordingly"
            )
        return found

    def _quantise(self, name: str, source: str, at: Precision) -> None:
        """A bundle in fewer bits, in a process of its own; notes how many layers are."""
        folder = self.extra[name]
        if not (folder / MANIFEST).exists() or not at.made(open_bundle(folder).manifest.quantization):
            self.progress.step(f"quantise {name}")
            vision, decoder = at.flags
            command = python_command("vtp.bench.common.fewer_bits", str(self.bundles[source]), str(folder))
            command += ["--vision", vision, "--decoder", decoder, "--prompt", at.prompt]
            command += ["--threads", str(self.spec.threads)]
            code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
            if code:
                raise VtpError(
                    f"{name} could not be quantised: vtp.bench.common.fewer_bits left with {code}, see above"
                )
        record = open_bundle(folder).manifest.quantization
        self.results["fewer_bits"][name] = {
            "layers": len(record["layers"]),
            "left": len(record["left_in_float"]),
        }

    def _prepare(self, name: str) -> None:
        line = missing(name)
        if line:
            self.results["missing"][name] = line
            return
        self.progress.step(f"prepare {name}")
        prepare(name, self.spec, self.log)

    def _able(self, names: Sequence[str]) -> list[str]:
        barred = {*self.results["missing"], *self.results["failed"]}
        return [name for name in names if name in self.chosen and name not in barred]

    def _aside(self, name: str, work: Callable[[], None]) -> None:
        """Do a peer's part; what goes wrong with it is noted and ends nothing else."""
        try:
            work()
        except (VtpError, Aside) as error:
            self.results["failed"][name] = str(error)
            self.progress.step(f"{name}: {error}")

    def _open(self, name: str) -> Worker:
        """Start a peer or one of vtp's bundles, and note how much memory it takes so far."""
        self.progress.step(f"open {name}")
        kind, spec = name, self.spec
        if name in {**self.bundles, **self.extra}:
            kind, spec = "vtp", dataclasses.replace(spec, bundle=str({**self.bundles, **self.extra}[name]))
        elif name == "vtp decoder":
            kind, spec = "vtp-decoder", dataclasses.replace(spec, bundle=str(self.bundles[BASE]))
        elif name == "vtp decoder int4":
            made = next(at.ours for at in self.precisions if at.flags[1] == "int4")
            kind, spec = "vtp-decoder", dataclasses.replace(spec, bundle=str(self.extra[made]))
        return Worker(kind, spec, self.log)

    def _pair(self, theirs: str, ours: str, mine: Worker | None = None) -> None:
        """Open both (`mine` may be open already), compare what should be equal, let them answer in turns."""
        with ExitStack() as stack:
            other = stack.enter_context(self._open(theirs))
            self._note_answer(theirs, other)
            if mine is None:
                mine = stack.enter_context(self._open(ours))
                self._note_answer(ours, mine)
            self._take_turns(theirs, other, ours, mine)

    def _note_answer(self, name: str, worker: Worker) -> None:
        """Keep a peer's answer, and hold it against the first of its kind. Aside when they differ."""
        self.answers[name] = worker.run()["tokens"], worker.logits()
        self.results["peers"].setdefault(name, {})
        same, judge = self._measure_of(name)
        if same is None:
            return
        equal = judge(self.answers[same], self.answers[name])
        self.results["peers"][name]["equal"] = {"to": same, **equal}
        if not equal["close"]:
            raise Aside(f"its answer is not {same}'s, {equal['why']}: not timed")

    def _measure_of(self, name: str) -> tuple[str | None, Callable[[Answer, Answer], dict[str, Any]]]:
        """Against whose answer one is held, and how: None for the first of its kind."""
        group = next((group for group in SAME if name in group), ())
        if not group:  # fewer bits, or rounded on the way: alike at best; other pruners choose for themselves
            pruned, whole = (
                [at.ours for at in PRECISIONS],
                [one for at in PRECISIONS for one in at.all_tokens],
            )
            alike: tuple[str, ...] = (BASE,) if name in pruned else EXACT if name in whole else ()
            alike = (LLAMACPP_ORDER, *alike) if name.startswith("llamacpp") else alike
            alike += tuple(one.source for one in self.towered if one.name == name)
            return self._first(alike, name), likeness
        judge = partial(agreement, limits="int4" if name in INT4_DECODERS else "float32")
        return self._first(group, name), judge

    def _first(self, group: Sequence[str], name: str) -> str | None:
        return next((one for one in group if one in self.answers and one != name), None)

    def _take_turns(self, theirs: str, other: Worker, ours: str, mine: Worker) -> None:
        turns = self._kept(theirs, ours, lambda: _turns({theirs: other, ours: mine}, self.rounds))
        for name, peak in turns.peaks.items():
            found = self.results["peers"][name]
            found["peak"] = max(peak, found.get("peak", 0))
            told = found.setdefault("parts", {})
            for part, ms in turns.times[name].items():
                if part not in WHAT:
                    told.setdefault(part, []).extend(ms)
        self.results["pairs"].append(pair_of(theirs, ours, turns.times))

    def _kept(self, theirs: str, ours: str, take: Callable[[], Turns]) -> Turns:
        """The turns of a pair: those that an ended run has taken, else new ones, which are kept."""
        folders = {**self.bundles, **self.extra}
        pair = {name: identity(folders.get(name)) for name in (theirs, ours)}
        turns = self.kept.get(pair)
        if turns is None:
            self.progress.step(f"{theirs} and {ours} in turns, {self.rounds} rounds")
            turns = take()
            self.kept.add(pair, turns)
        return turns

    def _stages(self, name: str) -> None:
        self.progress.step(f"{name}: stage by stage")
        folder = {**self.bundles, **self.extra}[name]
        task = Task(
            bundle=str(folder),
            image=self.spec.image,
            prompt=self.spec.prompt,
            engine="ort-cpu",
            threads=self.spec.threads,
            max_new_tokens=self.spec.tokens,
            repeats=self.rounds,
            small_ceilings=self.shape is None,
        )
        self.results["stages"][name] = in_child(task)


def _turns(workers: Mapping[str, Worker], rounds: int) -> Turns:
    """Two, each in its turn; who is first changes from round to round."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
    for number in range(rounds):
        turn = list(workers.items())
        for name, worker in turn if number % 2 else turn[::-1]:
            run = worker.run()
            for what, ms in {**{what: run[what] for what in WHAT}, **run.get("parts", {})}.items():
                times[name].setdefault(what, []).append(ms)
    peaks = {name: peak_resident(Path(f"/proc/{one.pid}/status")) for name, one in workers.items()}
    return Turns(times, peaks)


def _chosen(text: str) -> list[str]:
    known = [*FLOAT.peers, "torch-vispruner", "genai"]
    names = known if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise UsageError(f"unknown peer '{name}'; peers: {', '.join(known)}")
    return names


def _with_fewer_bits(names: Sequence[str], precisions: Sequence[Precision], int4: bool) -> list[str]:
    """The peers that were named, and what there is of each in this run's fewer bits."""
    more = dict.fromkeys(name for at in precisions[1:] for name in at.peers)
    more |= {"genai-int4": None} if int4 else {}
    return [*names, *(name for name in more if any(name.startswith(f"{one}-") for one in names))]


def _flags(args: argparse.Namespace) -> list[str]:
    """What the report's command line says of this run, for it to be repeated."""
    flags = [f"--{name}" for name in ("int8", "int4") if getattr(args, name)]
    flags += ["--towers", args.towers] if args.towers else []
    return [*flags, *([] if args.rounds == ROUNDS else ["--rounds", args.rounds])]


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (equals and name and (Path(folder) / MANIFEST).is_file()):
        raise UsageError(f"--also '{text}' is not NAME=DIR with a bundle in DIR")
    return f"vtp {name}", Path(folder)


def _ids(count: int) -> list[int]:
    """Tokens of the decoder-only comparison: any, within every vocabulary."""
    return np.random.default_rng(0).integers(10, 250, count).tolist()


if __name__ == "__main__":
    sys.exit(main())
