"""Everything that waits for a GPU, in one command: checks and measurements of ready bundles.

    python -m vtp.bench.gpu.command [--bundle DIR ...] [--engine ort-cuda] [--json FILE] [--quick]

Needs no network, no export and no installed vtp: bench/gpu_run.sh makes a bare checkout importable. Every
bundle runs in a process of its own. A check that fails, crashes or hangs is one line of the result, and the
next one starts in a fresh process, since a CUDA error spoils all that follows in the same one. Writes
bench/results/HARDWARE.json and .md after every bundle. With --engine ort-cpu all of it runs without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtp.bench.common.checkout import checkout, place
from vtp.bench.gpu.beside import SHAPE_CHECKS
from vtp.bench.gpu.checks import CHECKS, Job, checks_for
from vtp.bench.gpu.device import CUDA, device_for, load_cuda_libraries, slug
from vtp.bench.gpu.report import markdown, measured_before, write_results
from vtp.engines import UsageError, VtpError, capabilities, engine_names
from vtp.engines.child import python_command
from vtp.engines.ort.library import load_onnxruntime
from vtp.engines.versions import installed_version
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.commands.arguments import add_debug, real
from vtp.runtime.commands.console import DONE, FAILED, Parser, Progress, run_command
from vtp.runtime.machine.facts import Machine, look

BUNDLES = "build/gpu-bundles"
RESULTS = "bench/results"
ACCURACY = ("none", "vispruner", "adaptprune")  # the methods that take the exam, where they are given
_QUICK = {"questions": 4, "exam": 8, "rounds": 3, "steps": 4}
_POLL_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 also where a check failed, for that is a result."""
    parser = Parser(prog="python -m vtp.bench.gpu.command", description="Checks and measurements on a GPU.")
    add = parser.add_argument
    add("--bundle", nargs="+", metavar="DIR", help=f"bundles, float16 (default: all in {BUNDLES})")
    add("--engine", default=CUDA, help="default: %(default)s; tensorrt builds first; ort-cpu needs no GPU")
    add("--json", metavar="FILE", help="result, with a .md beside it (default: bench/results/HARDWARE.json)")
    add("--quick", action="store_true", help="few questions and rounds: does it run at all?")
    add("--resume", action="store_true", help="leave out bundles that the result holds without a failure")
    add("--limit", type=real, default=180, metavar="S", help="seconds of one check (default: %(default)s)")
    add("--child", nargs=3, metavar=("JOB", "CHECKS", "LOG"), help=argparse.SUPPRESS)
    add_debug(parser)
    args = parser.parse_args(argv)
    if args.child:
        return _child(*args.child)
    return run_command("gpu", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    """Run the checks of each bundle; written after each, so that a stopped run goes on."""
    if args.engine not in engine_names() or args.engine == "auto":
        raise UsageError(f"engine '{args.engine}' is not one of {', '.join(engine_names()[1:])}; name one")
    jobs, progress, machine = _jobs(args), Progress(), look()
    results: dict[str, Any] = {
        "name": hardware(machine, args.engine),
        "engine": args.engine,
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "quick": args.quick,
        "machine": stamp(machine),
        "bundles": {},
    }
    print("\n".join(f"{key}: {value}" for key, value in results["machine"].items() if value))
    target = place(args.json, "--json", f"{RESULTS}/{slug(results['name'])}.json")
    examined = _examined(jobs)
    results["bundles"] = _measured(target, args.quick) if args.resume else {}
    for name, job in jobs.items():
        if name in results["bundles"]:
            continue
        checks = [check for check in checks_for(args.engine) if check != "accuracy" or name in examined]
        progress.step(f"{name}: {', '.join(checks)}")
        found = run_checks(job, checks, args.limit)
        results["bundles"][name] = {**dataclasses.asdict(job), "bundle": name, "checks": found}
        results["bundles"][name]["reference"] = job.reference and Path(job.reference).name
        write_results(target, results, markdown(results))
    progress.end()
    print("\n" + markdown(results))
    print(f"{target} and {target.with_suffix('.md').name} written")


def _measured(target: Path, quick: bool) -> dict[str, Any]:
    """Bundles that an earlier run of the same kind measured, every check of them."""
    before = measured_before(target, quick)
    return {
        name: one
        for name, one in before.items()
        if all(check["status"] != "failed" for check in one["checks"].values())
    }


def _jobs(args: argparse.Namespace) -> dict[str, Job]:
    """A job per bundle, by folder name; float32 bundles serve float16 ones of their method as reference."""
    folders = [Path(name) for name in args.bundle or sorted((checkout("--bundle") / BUNDLES).glob("*/"))]
    manifests = {folder: open_bundle(folder).manifest for folder in folders}
    if not manifests:
        raise UsageError(f"no bundle in {BUNDLES}; make some with: vtp-export --dtype float16 -o DIR")
    jobs = {}
    for folder, manifest in manifests.items():
        if manifest.dtype == "float32" and not capabilities(args.engine).on_cpu:
            continue  # the engine takes none: it is here as a reference
        if folder.name in jobs:
            raise UsageError(f"two bundles are called '{folder.name}'; results go by the folder's name")
        sizes: dict[str, Any] = _QUICK if args.quick else {}
        jobs[folder.name] = Job(str(folder), args.engine, _reference(manifest, manifests), **sizes)
    if not jobs:
        raise UsageError("every bundle given is float32, which ort-cuda does not take; add float16 ones")
    return jobs


def _reference(manifest: Manifest, manifests: Mapping[Path, Manifest]) -> str | None:
    """The float32 bundle of the same method that holds the default keep-count of a float16 one."""
    for folder, other in manifests.items():
        same = other.method.name == manifest.method.name and manifest.visual.default_keep in other.visual.keep
        if same and other.dtype == "float32" and manifest.dtype != "float32":
            return str(folder)
    return None


def _examined(jobs: Mapping[str, Job]) -> set[str]:
    """Names of the three bundles that take the exam."""
    methods = {name: open_bundle(job.bundle).manifest.method.name for name, job in jobs.items()}
    named = [name for wanted in ACCURACY for name, method in methods.items() if method == wanted]
    return set((named or list(jobs))[:3])


def run_checks(job: Job, checks: Sequence[str], limit: float) -> dict[str, dict[str, Any]]:
    """Run checks in child processes, `limit` seconds each; every one has a `status` and a `note`.

    status   "ok", "noted" (it ran, and `note` says what is not as it should be) or "failed"
    """
    found: dict[str, dict[str, Any]] = {}
    while left := [check for check in checks if check not in found]:
        done, how = _children(job, left, limit)
        found.update(done)
        if not any(one["status"] == "failed" for one in done.values()) and len(done) < len(left):
            found[left[len(done)]] = {"status": "failed", "note": how}
    return found


def _children(job: Job, checks: Sequence[str], limit: float) -> tuple[dict[str, dict[str, Any]], str]:
    """One child: the checks that it finished, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        command = python_command("vtp.bench.gpu.command", "--child")
        arguments = [json.dumps(dataclasses.asdict(job)), ",".join(checks), str(log)]
        # What a library prints would land in the page on standard output; errors are shown as they come.
        child = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL)
        how = _watch(child, log, limit)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line.pop("check"): line for line in lines}, how


def _watch(child: subprocess.Popen[bytes], log: Path, limit: float) -> str:
    """Wait for a child's end, and end it when its log has not grown for `limit` seconds."""
    size, since = 0, time.monotonic()
    try:
        while (code := child.poll()) is None:
            if (now := log.stat().st_size) != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > limit:
                return f"took longer than {limit:g} s"
            time.sleep(_POLL_S)
        return f"its process was killed by signal {-code}" if code < 0 else f"its process left with {code}"
    finally:
        child.kill()
        child.wait()


def _child(job_text: str, checks: str, log: str) -> int:
    """Run checks one after another up to the first that fails; one JSON line each."""
    job = Job(**json.loads(job_text))
    for check in checks.split(","):
        try:
            load_cuda_libraries(job.engine)
            found = {**CHECKS, **SHAPE_CHECKS}[check](job, device_for(job.engine))
            line = {"check": check, "status": "noted" if found["note"] else "ok", **found}
        except Exception as error:  # whatever it is, it is this check's result
            kind = "" if isinstance(error, VtpError) else f"{type(error).__name__}: "
            line = {"check": check, "status": "failed", "note": kind + " ".join(str(error).split())[:300]}
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if line["status"] == "failed":
            return FAILED
    return DONE


def hardware(machine: Machine, engine: str) -> str:
    """The name of what an engine runs on: the first GPU, or the processor."""
    if not capabilities(engine).on_cpu:
        return machine.cuda.devices[0].name if machine.cuda.devices else "no GPU"
    return machine.processor or platform.machine()


def stamp(machine: Machine) -> dict[str, Any]:
    """Hardware and versions, for the result."""
    devices = [f"{one.name} (SM {one.sm}, {one.memory / 2**30:.0f} GiB)" for one in machine.cuda.devices]
    return {
        "GPU": ", ".join(devices) or f"none: {machine.cuda.reason}",
        "driver": machine.driver,
        "newest CUDA of the driver": machine.cuda.driver,
        "processor": machine.processor,
        "cores": machine.cores,
        "Python": platform.python_version(),
        "ONNX Runtime": _onnxruntime(),
        **{name: installed_version(name) for name in ("numpy", "torch", "transformers", "onnx")},
    }


def _onnxruntime() -> str:
    try:
        ort = load_onnxruntime()
    except ImportError as error:
        return f"does not import: {' '.join(str(error).split())[:200]}"
    return f"{ort.__version__} ({', '.join(ort.get_available_providers())})"


if __name__ == "__main__":
    sys.exit(main())
