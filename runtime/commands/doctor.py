"""vtp-doctor: what this machine is, what runs on it, what a bundle needs, and what to do about the rest."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from vtp.engines import Decision, capabilities, judge_engines
from vtp.engines.errors import shown
from vtp.engines.versions import version_numbers
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.bundle.memory import BundleMemory, bundle_memory
from vtp.runtime.commands.arguments import A_BUNDLE, add_debug, add_json, take_bundle
from vtp.runtime.commands.console import Parser, run_command, say, say_json, table
from vtp.runtime.machine.engine_trial import tried
from vtp.runtime.machine.facts import Machine, look

PROG = "vtp-doctor"
ORT_GPU_CUDA = 13  # PyPI's onnxruntime-gpu is built for it
ORT_GPU_SM = 7.5
NEW_OPERATORS = (10, 15)  # the TensorRT from which target tensorrt's operators are known


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp-doctor."""
    parser = Parser(prog=PROG, description="Tell what this machine can run, and what a bundle needs.")
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help=A_BUNDLE)
    add_json(parser)
    add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vtp-doctor; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    bundle = open_bundle(take_bundle(PROG, args.bundle, args.json)) if args.bundle else None
    report = examine(look(), bundle)
    if args.json:
        say_json(report)
    else:
        say(render(report))


def examine(machine: Machine, bundle: Bundle | None = None, engines: list[Decision] | None = None) -> dict:
    """The report as data. `engines` are the decisions for the bundle's dtype (None: asked and tried here)."""
    dtype = bundle.manifest.dtype if bundle else None
    if engines is None:
        target = bundle.manifest.target if bundle else None
        engines = tried(judge_engines(dtype, cuda=lambda: machine.cuda, target=target), machine, bundle)
    report: dict[str, Any] = {
        "machine": dataclasses.asdict(machine),
        "engines": [decision.to_json() for decision in engines],
    }
    target = bundle.manifest.target if bundle else None
    advice = [
        *_advise_packages(machine, engines),
        *_advise_tensorrt(machine, target),
        *_advise_board(machine),
    ]
    if bundle:
        report["bundle"] = _bundle_report(machine, bundle, engines)
        advice += report["bundle"].pop("advice")
    report["advice"] = advice
    return report


def _bundle_report(machine: Machine, bundle: Bundle, engines: list[Decision]) -> dict[str, Any]:
    engine = next((decision.engine for decision in engines if decision.accepted), "ort-cpu")
    needs = bundle_memory(bundle, engine)
    room = machine.room(on_cpu=capabilities(engine).on_cpu)
    fits = needs.total <= room if room else None
    return {
        "folder": str(bundle.folder),
        **bundle.stated_origin,
        "method": bundle.manifest.method.name,
        "target": bundle.manifest.target,
        "dtype": bundle.manifest.dtype,
        "engine": engine,
        "stages": [
            {**dataclasses.asdict(stage), "total": stage.total, "fits": stage.total <= room if room else None}
            for stage in needs.stages
        ],
        "beside": needs.beside,
        "total": needs.total,
        "room": room,
        "fits": fits,
        "advice": _advise_memory(needs, room, bundle) if fits is False else [],
    }


def _advise_memory(needs: BundleMemory, room: int, bundle: Bundle) -> list[str]:
    """What to change when a bundle does not fit, largest effect first."""
    manifest, able = bundle.manifest, capabilities(needs.engine)
    largest = max(needs.stages, key=lambda stage: stage.total)
    lines = [
        f"this bundle may need {_mb(needs.total)} MB on {needs.engine}, and {_mb(room)} MB are free: "
        f"{largest.file} takes {_mb(largest.total)} MB"
    ]
    if manifest.dtype == "float32" and not able.on_cpu:
        lines.append("export with --dtype float16 to halve weights and cache")
    if manifest.dtype == "float16" and able.widens_float16:
        lines.append("export with --dtype float32 for the CPU, which widens float16 weights and keeps both")
    if sum(stage.cache + stage.activations for stage in needs.stages) > needs.total // 4:
        lines.append(f"export with a --max-length below {manifest.model.max_length}")
    if manifest.visual.default_keep == manifest.visual.count:
        lines.append("export with a --method that prunes: the decoder then holds fewer visual tokens")
    return lines


def _advise_packages(machine: Machine, engines: list[Decision]) -> list[str]:
    packages, lines = machine.packages, []
    if {"onnxruntime", "onnxruntime-gpu"} <= set(packages):
        lines.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall both, then install one"
        )
    if machine.cuda.devices and not any(one.accepted for one in engines if one.engine == "ort-cuda"):
        lines.append(_advise_gpu(machine, engines))
    elif not any(one.accepted for one in engines):
        installed = {"onnxruntime", "onnxruntime-gpu"} & set(packages)
        lines.append(
            "no engine runs here, see why above"
            if installed
            else "no engine runs here: pip install 'vtp-edge[ort]'"
        )
    return lines


def _advise_gpu(machine: Machine, engines: list[Decision]) -> str:
    """There is a GPU that no engine uses."""
    device = machine.cuda.devices[0]
    code = next((one.code for one in engines if one.engine == "ort-cuda"), "")
    if code == "target":
        return f"to use the {device.name}, export the bundle with --target ort"
    if code == "dtype":
        return f"to use the {device.name}, export the bundle with --dtype float16"
    if machine.is_jetson:
        return (
            f"to use the {device.name}, install onnxruntime-gpu from NVIDIA's package index for JetPack "
            f"{machine.jetpack or '(its version)'}: PyPI's build for aarch64 has no code for Jetson GPUs"
        )
    if float(device.sm) < ORT_GPU_SM:
        return f"PyPI's onnxruntime-gpu needs SM {ORT_GPU_SM} or newer; the {device.name} has SM {device.sm}"
    if machine.cuda.driver and float(machine.cuda.driver) < ORT_GPU_CUDA:
        return (
            f"to use the {device.name}, update the driver, which serves CUDA {machine.cuda.driver}, for "
            f"CUDA {ORT_GPU_CUDA}.0; then pip install 'vtp-edge[ort-gpu]' in place of onnxruntime"
        )
    return f"to use the {device.name}: pip install 'vtp-edge[ort-gpu]' in place of onnxruntime"


def _advise_tensorrt(machine: Machine, target: str | None) -> list[str]:
    """Which target this machine's TensorRT reads, where a bundle is of another or there is none yet."""
    version = machine.packages.get("tensorrt") or machine.tensorrt
    if not version or not machine.cuda.devices:
        return []
    fitting = "tensorrt" if version_numbers(version)[:2] >= NEW_OPERATORS else "jetpack6"
    if target == fitting or (target == "jetpack6" and fitting == "tensorrt"):
        return []
    return [
        f"for TensorRT {version} export with --target {fitting}, then: vtp-build BUNDLE --engine tensorrt"
    ]


def _advise_board(machine: Machine) -> list[str]:
    lines = []
    if machine.is_jetson and machine.power and "MAXN" not in machine.power:
        lines.append("for full speed: sudo nvpmodel -m 0 (else the mode named MAXN), then sudo jetson_clocks")
    if machine.is_jetson and not machine.memory.swap:
        lines.append("no swap: building TensorRT engines on the board may run out of memory; add a swap file")
    return lines


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    parts = [_machine_lines(report["machine"])]
    rows = [[one["engine"], "yes" if one["accepted"] else "no", one["reason"]] for one in report["engines"]]
    parts.append(table(["engine", "runs here", "why"], rows))
    if "bundle" in report:
        parts.append(_bundle_lines(report["bundle"]))
    parts += [f"→ {line}" for line in report["advice"]]
    return "\n\n".join(parts)


def _machine_lines(machine: dict[str, Any]) -> str:
    """The machine, a line for each thing that is known of it."""
    memory, cuda = machine["memory"], machine["cuda"]
    gpus = [f"{one['name']} (SM {one['sm']}, {_mb(one['memory'])} MB)" for one in cuda["devices"]]
    versions = [f"{name} {version}" for name, version in machine["packages"].items()]
    jetpack = f"{machine['jetpack']} (Jetson Linux {machine['l4t']})" if machine["l4t"] else ""
    limit = f", {_mb(memory['limit'])} left in this container" if memory["limit"] else ""
    rows = {
        "device": machine["board"] or machine["processor"],
        "system": machine["system"],
        "JetPack": jetpack,
        "processor": f"{machine['cores']} cores",
        "memory": f"{_mb(memory['total'])} MB, {_mb(memory['available'])} free{limit}, "
        f"swap {_mb(memory['swap'])}",
        "power": machine["power"] or "not told",
        "GPU": ", ".join(gpus) or f"none: {cuda['reason']}",
        "driver": machine["driver"],
        "CUDA": ", ".join(
            part
            for part in (
                f"driver serves {cuda['driver']}" if cuda["driver"] else "",
                f"toolkit {machine['toolkit']}" if machine["toolkit"] else "",
            )
            if part
        ),
        "TensorRT": machine["tensorrt"] or "no system library",
        "packages": ", ".join(versions) or "none of those that engines need",
    }
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items() if value)


def _bundle_lines(bundle: dict[str, Any]) -> str:
    header = ["graph", "weights MB", "cache MB", "activations MB ≤", "fits"]
    said = {True: "yes", False: "no", None: "?"}
    rows = [
        [
            one["file"],
            *(_mb(one[key]) for key in ("weights", "cache", "activations")),
            said[one["fits"]],
        ]
        for one in bundle["stages"]
    ]
    total = (
        f"all of it on {bundle['engine']}: at most {_mb(bundle['total'])} MB "
        f"({_mb(bundle['beside'])} beside the graphs)"
    )
    verdict = {True: "fits", False: "does not fit", None: "unknown whether it fits"}[bundle["fits"]]
    return (
        f"{shown(bundle['folder'])} ({shown(bundle['method'])}, {shown(bundle['target'])}, "
        f"{shown(bundle['dtype'])})\n"
        f"{table(header, rows)}\n{total}; {_mb(bundle['room'])} MB free: {verdict}"
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count < 100e6 else f"{count / 1e6:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
