"""A full-size shape on a GPU: vtp's stages beside PyTorch transformers', in turns, and what was aimed at.

    python -m vtp.bench.gpu.shape [--work build/gpu-shape] [--engine ort-cuda] [--json FILE] [--quick]

Takes the bundles that `vtp.bench.gpu.pack` packed, unpacked into the folder --work, fills them with random
numbers (once; 14 GB of disk for LLaVA-1.5-7B) and measures each in a process of its own. Needs what
`vtp.bench.gpu.command` needs, and transformers. Results are written after every bundle; a second run goes on
with what is missing. With --engine ort-cpu all of it runs without a GPU, on a tiny shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtp.bench.common.checkout import place
from vtp.bench.gpu.beside import SHAPE_CHECKS
from vtp.bench.gpu.checks import Job
from vtp.bench.gpu.command import RESULTS, hardware, run_checks, stamp
from vtp.bench.gpu.device import CUDA, slug
from vtp.bench.gpu.report import measured_before, write_results
from vtp.bench.gpu.shape_report import markdown
from vtp.bench.shapes.weight_map import WEIGHT_MAP
from vtp.engines import UsageError, engine_names
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.arguments import add_debug, real
from vtp.runtime.commands.console import Parser, Progress, run_command
from vtp.runtime.machine.facts import look

WORK = "build/gpu-shape"
_QUICK: dict[str, Any] = {"rounds": 3, "steps": 4}
_FULL: dict[str, Any] = {"rounds": 20, "steps": 32}
_PREFILL_CUT, _PRUNER_MS, _BANDWIDTH, _AT = 0.75, 0.5, 0.85, 64


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 also where a check failed, for that is a result."""
    parser = Parser(prog="python -m vtp.bench.gpu.shape", description="A full-size shape on a GPU.")
    add = parser.add_argument
    add("--work", metavar="DIR", help=f"the unpacked bundles (default: {WORK} of the checkout)")
    add("--engine", default=CUDA, help="default: %(default)s; ort-cpu needs no GPU")
    add("--json", metavar="FILE", help="result, with a .md beside it (default: in bench/results)")
    add("--quick", action="store_true", help="few rounds: does it run at all?")
    add("--no-cuda-graph", action="store_true", help="record nothing on vtp's side")
    add("--limit", type=real, default=250, metavar="S", help="seconds of one check (default: %(default)s)")
    add("--again", action="store_true", help="measure again what the result holds already")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("gpu_shape", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    """Measure each bundle beside PyTorch; written after each, so that a stopped run goes on."""
    if args.engine not in engine_names()[1:]:
        raise UsageError(f"engine '{args.engine}' is not one of {', '.join(engine_names()[1:])}; name one")
    jobs, progress, machine = _jobs(args), Progress(), look()
    called = hardware(machine, args.engine)
    shape = open_bundle(next(iter(jobs.values())).bundle).manifest.model.name
    target = place(args.json, "--json", f"{RESULTS}/{slug(f'{called} {shape}')}.json")
    results: dict[str, Any] = {
        "name": called,
        "shape": shape,
        "engine": args.engine,
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "quick": args.quick,
        "machine": stamp(machine),
        "bundles": {} if args.again else _measured(target, args.quick),
    }
    for label, job in jobs.items():
        if label in results["bundles"]:
            progress.step(f"{label}: measured before")
            continue
        progress.step(f"{label}: weights, then beside PyTorch")
        found = run_checks(job, list(SHAPE_CHECKS), args.limit)
        results["bundles"][label] = {
            "method": job.bundle.rsplit("/", 1)[-1],
            "keep": job.keep,
            "checks": found,
        }
        results["aims"] = aims(results["bundles"])
        write_results(target, results, markdown(results))
    progress.end()
    results["aims"] = aims(results["bundles"])
    write_results(target, results, markdown(results))
    print("\n" + markdown(results))
    print(f"{target} and {target.with_suffix('.md').name} written")


def _jobs(args: argparse.Namespace) -> dict[str, Job]:
    """One for each bundle and keep-count, by "method keep"."""
    work = place(args.work, "--work", WORK)
    folders = sorted(path.parent for path in work.glob(f"*/{WEIGHT_MAP}"))
    if not folders:
        raise UsageError(
            f"no bundle with a {WEIGHT_MAP} in {work}; pack some with: python -m vtp.bench.gpu.pack, "
            "and unpack the archive there"
        )
    base = Job("", args.engine, cuda_graph=not args.no_cuda_graph, **(_QUICK if args.quick else _FULL))
    return {
        f"{folder.name} {keep}": dataclasses.replace(base, bundle=str(folder), keep=keep)
        for folder in sorted(folders, key=lambda folder: folder.name != "none")
        for keep in sorted(open_bundle(folder).manifest.visual.keep, reverse=True)
    }


def _measured(target: Path, quick: bool) -> dict[str, Any]:
    """What an earlier run of the same kind measured without a failure."""
    before = measured_before(target, quick)
    return {label: one for label, one in before.items() if "ms" in one["checks"].get("beside", {})}


def aims(bundles: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, what came out, and whether it is met; None where nothing was measured."""
    ran = {label: one for label, one in bundles.items() if "ms" in one["checks"].get("beside", {})}
    whole = next((one for one in ran.values() if one["method"] == "none"), None)
    found = []
    for label, one in ran.items():
        figures = one["checks"]["beside"]
        ms = {part: values["median"] for part, values in figures["ms"]["vtp"].items()}
        if one is not whole and one["keep"] <= _AT:
            cut = None if whole is None else 1 - ms["prefill"] / _median(whole, "prefill")
            found.append(_aim(label, "share of the prefill cut", cut, _PREFILL_CUT))
        if "pruner" in ms:
            found.append(_aim(label, "pruner, ms", ms["pruner"], _PRUNER_MS, most=True))
        rate = figures["step_bytes"] / (ms["decode step"] / 1e3)
        share = rate / max(figures["bandwidth"].values())
        found.append(_aim(label, "decode, share of the memory's rate", share, _BANDWIDTH))
    return found


def _median(bundle: Mapping[str, Any], part: str) -> float:
    return float(bundle["checks"]["beside"]["ms"]["vtp"][part]["median"])


def _aim(label: str, what: str, found: float | None, aim: float, most: bool = False) -> dict[str, Any]:
    met = None if found is None else found <= aim if most else found >= aim
    return {"bundle": label, "what": what, "aim": aim, "most": most, "found": found, "met": met}


if __name__ == "__main__":
    sys.exit(main())
