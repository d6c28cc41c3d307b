"""One command for people with a network: a checkpoint, its bundles, a public set, the table.

    python -m vtp.bench.real --model llava-hf/llava-1.5-7b-hf --data gqa [--limit 500] [--methods vispruner]

Downloads the checkpoint (huggingface_hub: resumed, with its progress bars) and what the set lacks, exports
the unpruned bundle and one for each method, holds them against torch, asks every question at every keep-count
and writes SET.json and SET.md. Every answer is written down as it comes: a run that was ended goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vtp.bench.real.asking import Asker, Row, compared
from vtp.bench.real.bundles import NONE, Exports, kept_counts
from vtp.bench.real.fetching import fetch_pictures, fetch_questions
from vtp.bench.real.report import page
from vtp.bench.real.sets import INSTRUCTION, SETS, PublicSet
from vtp.calib.data import Sample
from vtp.calib.keep.journal import Journal
from vtp.engines import UsageError
from vtp.engines.disk.whole import whole_file
from vtp.export.checkpoint.loading import model_name, resolve
from vtp.export.cli import quiet_libraries
from vtp.export.keep_counts import parse_keep
from vtp.export.pruners import resolve_method
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.commands.arguments import add_debug, add_engine, add_json, add_threads, whole
from vtp.runtime.commands.console import Parser, Progress, note, run_command, say, say_json
from vtp.runtime.shell import command_line

PROG = "real"
METHODS = "vispruner"
KEEP = "192,128,64"
ANSWER_TOKENS = 128  # as LLaVA's own evaluation
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
_LLAVA = ("llava-1.5", "llava-v1.5")  # whose own evaluation pads pictures and begins with that sentence
_RESUMES = "every answer so far is written down, and the same command goes on from there"


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = Parser(
        prog="python -m vtp.bench.real",
        description="A real checkpoint on public sets, beside the papers' figures.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR|HUB_ID", help="checkpoint: of the hub, or a folder")
    add("--data", required=True, metavar="SET[,SET...]", help=f"of {', '.join(SETS)}")
    add("--data-dir", metavar="DIR", help="folder of the sets' folders (default: data in --work)")
    add("--limit", type=whole, metavar="N", help="the first N questions of each of a set's files")
    add("--methods", default=METHODS, metavar="NAME[,NAME...]", help="default: %(default)s")
    add("--keep", default=KEEP, metavar="K[,K...]", help="visual tokens to keep (default: %(default)s)")
    add("--target", default="ort", help="as vtp-export's (default: %(default)s)")
    add("--dtype", help="as vtp-export's; float16 for a GPU")
    add("--image-size", type=whole, metavar="N", help="as vtp-export's, where the model takes several")
    add("--image-fit", metavar="FIT", help="as vtp-export's (default: letterbox for LLaVA-1.5)")
    add("--max-length", type=whole, metavar="N", help="as vtp-export's")
    add("--verify", default="auto", help="full, layers, none, or auto: by the memory (default: %(default)s)")
    add("--system", metavar="TEXT", help="system prompt (default: Vicuna's for LLaVA-1.5, else none)")
    add(
        *("--max-new-tokens",),
        type=whole,
        default=ANSWER_TOKENS,
        metavar="N",
        help="of one answer (default: %(default)s)",
    )
    add_engine(parser)
    add_threads(parser, type=whole)
    add("--work", default="build/real", metavar="DIR", help="folder of everything (default: %(default)s)")
    add("--no-fetch", action="store_true", help="take the data that is there and ask no network for it")
    add_json(parser, "print the results as JSON")
    add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(words)
    args.command = command_line("python", "-m", "vtp.bench.real", *words)
    return run_command(PROG, lambda: _run(args), args.debug, _RESUMES)


def _run(args: argparse.Namespace) -> None:
    sets, methods, keeps = _checked(args)
    model = resolve(args.model)  # before the libraries are quiet: a download shows its bars
    quiet_libraries()
    work = Path(args.work) / model_name(model).replace("/", "--")
    progress, told = Progress(), list[str]()
    try:
        questions = {one.name: _questions(one, args, progress.step) for one in sets}
        exports = _exports(args, model, work)
        bundles = _bundles(exports, methods, keeps, progress.step, told.append)
        found = [_on_set(one, questions[one.name], bundles, exports, args, progress.step) for one in sets]
    finally:
        progress.end()
    for line in dict.fromkeys(told):
        note(PROG, line)
    if args.json:
        say_json(found)
    else:
        say("\n".join(page(results) for results in found))


def _checked(args: argparse.Namespace) -> tuple[list[PublicSet], list[str], list[int]]:
    """What can be refused before anything is downloaded."""
    names = args.data.split(",")
    unknown = next((name for name in names if name not in SETS), None)
    if unknown is not None:
        raise UsageError(f"--data '{unknown}' is not a known set; choose of {', '.join(SETS)}")
    for name in ("limit", "max_new_tokens", "threads", "image_size", "max_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.verify not in ("auto", "full", "layers", "none"):
        raise UsageError(f"unknown verify '{args.verify}'; choose one of auto, full, layers, none")
    methods = [method for method in dict.fromkeys(args.methods.split(",")) if method != NONE]
    for method in methods:
        resolve_method(method)
    keeps = parse_keep(args.keep)
    if min(keeps) < 1:
        raise UsageError(f"--keep {min(keeps)} keeps nothing; choose at least 1")
    return [SETS[name] for name in dict.fromkeys(names)], methods, keeps


def _questions(chosen: PublicSet, args: argparse.Namespace, progress: Callable[[str], None]) -> list[Sample]:
    """A set's questions, with their pictures on the disk."""
    folder = _folder(chosen, args)
    if not args.no_fetch:
        fetch_questions(chosen, folder, progress)
    samples = chosen.read(folder, args.limit)
    if not args.no_fetch:
        fetch_pictures(chosen, folder, samples, progress)
    chosen.check(folder, samples)
    return samples


def _folder(chosen: PublicSet, args: argparse.Namespace) -> Path:
    return Path(args.data_dir or Path(args.work) / "data") / chosen.name


def _exports(args: argparse.Namespace, model: Path, work: Path) -> Exports:
    size = None if args.image_size is None else (args.image_size, args.image_size)
    fit = args.image_fit or ("letterbox" if _is_llava(model) else None)
    return Exports(model, work, args.target, args.dtype, size, fit, args.max_length, args.verify)


def _is_llava(model: Path) -> bool:
    return any(part in model_name(model).lower() for part in _LLAVA)


def _bundles(
    exports: Exports,
    methods: Sequence[str],
    keeps: Sequence[int],
    progress: Callable[[str], None],
    note: Callable[[str], None],
) -> list[tuple[Bundle, str, list[int]]]:
    """The unpruned bundle and each method's, with the keep-counts that are asked of it."""
    exports.check_disk(1 + len(methods))
    whole = exports.unpruned(progress, note)
    count = whole.manifest.visual.count
    kept = kept_counts(keeps, count) if methods else []
    pruned = [(exports.pruned(method, kept, progress, note), method, kept) for method in methods]
    return [(whole, NONE, [count]), *pruned]


def _on_set(
    chosen: PublicSet,
    samples: Sequence[Sample],
    bundles: Sequence[tuple[Bundle, str, list[int]]],
    exports: Exports,
    args: argparse.Namespace,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Ask a set's questions, and write SET.json and SET.md."""
    system = args.system if args.system is not None else VICUNA if _is_llava(exports.model) else ""
    journal = Journal(exports.work / f"{chosen.name}.answers.jsonl")
    asker = Asker(
        chosen,
        samples,
        journal,
        engine=args.engine,
        threads=args.threads,
        max_new_tokens=args.max_new_tokens,
        system=system,
        progress=progress,
    )
    try:
        rows = [asker.row(bundle, method, keep) for bundle, method, keeps in bundles for keep in keeps]
    finally:
        asker.close()
        journal.close()
    results = _results(chosen, samples, rows, bundles[0][0], exports, args)
    results |= {"conditions": asker.conditions, "system": system}
    _write(exports.work / f"{chosen.name}.json", json.dumps(results, indent=1) + "\n")
    _write(exports.work / f"{chosen.name}.md", page(results))
    return results


def _results(
    chosen: PublicSet,
    samples: Sequence[Sample],
    rows: Sequence[Row],
    whole: Bundle,
    exports: Exports,
    args: argparse.Namespace,
) -> dict[str, Any]:
    manifest = whole.manifest
    return {
        "set": chosen.name,
        "title": chosen.title,
        "metric": chosen.metric,
        "score": chosen.score,
        "model": model_name(exports.model),
        "questions": len(samples),
        "limit": args.limit,
        "prompt": INSTRUCTION,
        "hinted": chosen.is_hinted(_folder(chosen, args)),
        "visual_tokens": manifest.visual.count,
        "image_fit": exports.image_fit or "as the model's image processor",
        "max_new_tokens": args.max_new_tokens,
        "target": exports.target,
        "dtype": manifest.dtype,
        "verify": manifest.parity.get("mode", "none"),
        "command": args.command,
        "rows": compared(rows, chosen, samples),
    }


def _write(file: Path, text: str) -> None:
    with whole_file(file) as part:
        part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
