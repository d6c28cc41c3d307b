"""TensorRT engines kept in a folder: built once in a process of their own, stamped, refused when stale.

A build can take minutes and all of a board's memory. So it is estimated first, runs in a child process whose
death is one line and not the caller's (`build_process`), and its result appears whole or not at all.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtp.engines.cuda.driver import CudaProbe, probe_cuda
from vtp.engines.disk.files import sha256
from vtp.engines.disk.whole import whole_file
from vtp.engines.errors import VtpError, quoted
from vtp.engines.graph.file import read_graph
from vtp.engines.graph.memory import graph_memory
from vtp.engines.plugins.greedy import SOURCE
from vtp.engines.strict_json import read_json
from vtp.engines.tensorrt.build_process import run_build
from vtp.engines.tensorrt.library import (
    BuildOptions,
    Profiles,
    Step,
    load_library,
    profile_list,
)
from vtp.engines.tensorrt.store import cache_folder, check_folder, is_private, is_signed, make_folder, sign

PLAN, STAMP = ".plan", ".json"
STAMP_BYTES = 1 << 20
_KINDS = {"bytes": int, "gate": dict}  # of a stamp's fields; all others are text
ANY_SM = "any"  # a TensorRT-RTX engine is finished on the device that runs it
# Of the host while building, measured with TensorRT-RTX 1.7: parsed weights, the builder's and the engine's.
_COPIES, _BESIDE = 3, 250_000_000


@dataclass(frozen=True)
class Stamp:
    """What an engine file was made from and for; it is kept beside the file.

    graph      sha256 over the graph file and the weights it refers to
    settings   what else changes the engine: profile and options
    gate       how it compared with ONNX Runtime, and on which device; empty: never compared
    mac        this machine's signature of all the others (`store.sign`)
    """

    engine: str
    version: str
    sm: str
    graph: str
    settings: str
    bytes: int
    sha256: str
    gate: dict[str, Any] = field(default_factory=dict)
    mac: str = ""

    @property
    def signed_part(self) -> builtins.bytes:
        """What `mac` signs."""
        return json.dumps({**dataclasses.asdict(self), "mac": ""}, sort_keys=True).encode()

    @property
    def key(self) -> str:
        """The part of the file's name that tells engines of one graph apart."""
        return _digest([self.engine, self.version, self.sm, self.graph, self.settings])[:16]


@dataclass(frozen=True)
class StoredEngine:
    """An engine file and its stamp; `built` says whether this call made it."""

    path: Path
    stamp: Stamp
    built: bool


@dataclass(frozen=True)
class Room:
    """Free bytes: the host's, the GPU's (0: not known), and whether the two are one memory (a Jetson)."""

    host: int
    device: int = 0
    shared: bool = False


@dataclass(frozen=True)
class BuildMemory:
    """Bytes that a build needs; for TensorRT-RTX, which builds without a GPU, `device` is 0."""

    host: int
    device: int
    weights: int


def estimate_build(
    path: str | Path, engine: str, profile: Profiles | None = None, options: BuildOptions | None = None
) -> BuildMemory:
    """What building a graph takes.

    On the host three times its weights; on the GPU, where full TensorRT times every kernel, the weights,
    the largest tensors and the workspace.
    """
    found = graph_memory(path, _largest_axes(path, profile))
    device = found.weights + found.activations + (options or BuildOptions()).workspace
    host = _COPIES * found.weights + _BESIDE
    return BuildMemory(host, 0 if engine == "tensorrt-rtx" else device, found.weights)


def store_engine(
    path: str | Path,
    engine: str,
    folder: str | Path,
    profile: Profiles | None = None,
    options: BuildOptions | None = None,
    room: Room | None = None,
    step: Step = lambda phase, done, total: None,
    cuda: Callable[[], CudaProbe] = probe_cuda,
) -> StoredEngine:
    """Return the engine of a graph from `folder`; built first where it is not there or not whole.

    Raises VtpError in one line: not enough room (with what would fit), a graph that the library does not
    take, a build that fails or is killed. The folder then holds what it held before.
    """
    path, folder, options = Path(path), Path(folder), options or BuildOptions()
    check_folder(folder)
    version = load_library(engine).__version__
    settings = settings_hash(profile, options)
    wanted = Stamp(engine, version, device_sm(engine, cuda), graph_hash(path), settings, 0, "")
    target = folder / f"{path.stem}-{wanted.key}{PLAN}"
    with contextlib.suppress(VtpError):  # not there, or not whole: a build that was interrupted
        stored = StoredEngine(target, read_stamp(target, check_hash=not is_private(target)), False)
        with contextlib.suppress(OSError):  # a folder that cannot be written holds what it holds
            os.utime(target)  # of several engines of a graph the one that was asked for last is run
        return stored
    if room is not None:
        _check_room(path.name, estimate_build(path, engine, profile, options), room)
    make_folder(folder)
    stamp = _build_aside(path, target, profile, options, wanted, step)
    return StoredEngine(target, stamp, True)


def check_engine(
    path: str | Path,
    engine: str,
    rebuild: str,
    graph: str = "",
    check_hash: bool = False,
    cuda: Callable[[], CudaProbe] = probe_cuda,
) -> Stamp:
    """Return the stamp of an engine file that can run here, now; else VtpError with the reason.

    `rebuild` is the command that makes it anew; `graph` the hash it must have been built from, if known;
    with `check_hash`, and always outside the user's cache, the file's content is held against its stamp.
    """
    path = Path(path)
    try:
        stamp = read_stamp(path, check_hash or not is_private(path))
    except VtpError as error:
        raise VtpError(f"{error}; rebuild it with: {rebuild}") from error
    version, sm = load_library(engine).__version__, device_sm(engine, cuda)
    for what, had, wants in (
        ("the engine kind", stamp.engine, engine),
        ("version", stamp.version, version),
        ("compute capability", stamp.sm, sm),
        ("graph", stamp.graph[:12], graph[:12] or stamp.graph[:12]),
    ):
        if had != wants:
            raise VtpError(
                f"engine {path.name} was built for {what} {had}, this is {wants}; rebuild it with: {rebuild}"
            )
    return stamp


def find_engine(
    graph: str | Path,
    engine: str,
    folder: str | Path,
    rebuild: str,
    known: Mapping[str, str] | None = None,
    cuda: Callable[[], CudaProbe] = probe_cuda,
) -> tuple[Path, Stamp]:
    """The engine of a graph in `folder` that can run here, now, the newest of several; compared or not.

    `known` are sha256 of the graph's files, where somebody has them; `rebuild` the command that builds.
    Raises VtpError: none was built, or why those that were cannot run.
    """
    graph = Path(graph)
    check_folder(Path(folder))
    wanted, problem = graph_hash(graph, known), ""
    plans = sorted(
        Path(folder).glob(f"{glob.escape(graph.stem)}-*{PLAN}"), key=lambda path: -path.stat().st_mtime
    )
    for plan in plans:
        try:
            return plan, check_engine(plan, engine, rebuild, wanted, cuda=cuda)
        except VtpError as error:
            problem = problem or str(error)
    raise VtpError(problem or f"no {engine} engine of {graph.name} in {folder}; build it with: {rebuild}")


def set_gate(path: str | Path, gate: Mapping[str, Any]) -> Stamp:
    """Note beside an engine how it compared with ONNX Runtime; returns the new stamp."""
    path = Path(path)
    stamp = dataclasses.replace(read_stamp(path), gate=dict(gate))
    return write_stamp(path, stamp)


def write_stamp(path: Path, stamp: Stamp) -> Stamp:
    """Sign a stamp and put it beside its engine; returns it with the signature."""
    stamp = dataclasses.replace(stamp, mac=sign(stamp.signed_part))
    with whole_file(path.with_suffix(STAMP)) as part:
        part.write_text(json.dumps(dataclasses.asdict(stamp), indent=1), encoding="utf-8")
    return stamp


def check_gate(
    path: str | Path, stamp: Stamp, rebuild: str, cuda: Callable[[], CudaProbe] = probe_cuda
) -> None:
    """Refuse an engine that was not found equal to ONNX Runtime on this device."""
    name, gate, found = Path(path).name, stamp.gate, cuda()
    here = found.devices[0].name if found.devices else "no GPU"
    if not gate:
        raise VtpError(f"engine {name} was never compared with ONNX Runtime; compare it with: {rebuild}")
    if gate.get("device") != here:
        raise VtpError(
            f"engine {name} was compared with ONNX Runtime on {gate.get('device')}, this is {here}; "
            f"compare it here with: {rebuild}"
        )
    if not gate.get("passed"):
        raise VtpError(f"engine {name} does not answer as ONNX Runtime does: {gate.get('note')}")


def read_stamp(path: str | Path, check_hash: bool = False) -> Stamp:
    """The stamp beside an engine file, held against this machine's key and the file's size (and content).

    VtpError where either is not whole, or the engine is not one that was built here.
    """
    path = Path(path)
    try:
        stamp = _stamp(read_json(path.with_suffix(STAMP), STAMP_BYTES))
        size = path.stat().st_size
    except (OSError, VtpError) as error:
        raise VtpError(f"engine {path.name} is missing or was not finished") from error
    if not is_signed(stamp.signed_part, stamp.mac):
        raise VtpError(f"engine {path.name} was not built by this user on this machine")
    if size != stamp.bytes:
        raise VtpError(f"engine {path.name} has {size} bytes of {stamp.bytes}: it was cut off")
    if check_hash and sha256(path) != stamp.sha256:
        raise VtpError(f"engine {path.name} is not what was built: it was changed")
    return stamp


def _stamp(data: Any) -> Stamp:
    """A stamp as it was written. Raises VtpError for anything else."""
    kinds = {one.name: _KINDS.get(one.name, str) for one in dataclasses.fields(Stamp)}
    if isinstance(data, dict):
        data = {"mac": "", **data}  # one without a signature is whole, and nobody's: it is refused as such
    if not (isinstance(data, dict) and set(data) == set(kinds)):
        raise VtpError(f"a stamp has {', '.join(kinds)}")
    wrong = next((name for name, kind in kinds.items() if not isinstance(data[name], kind)), None)
    if wrong is not None:
        raise VtpError(f"{wrong} of a stamp is {quoted(data[wrong])}")
    return Stamp(**data)


def device_sm(engine: str, cuda: Callable[[], CudaProbe] = probe_cuda) -> str:
    """The compute capability that an engine is tied to. VtpError for full TensorRT without a GPU."""
    if engine == "tensorrt-rtx":
        return ANY_SM
    found = cuda()
    if not found.devices:
        raise VtpError(
            f"TensorRT builds on the GPU that runs the engine, and there is none: {found.reason}; "
            "build on the device, or with --engine tensorrt-rtx"
        )
    return found.devices[0].sm


def settings_hash(profile: Profiles | None, options: BuildOptions) -> str:
    """sha256 over what changes an engine beside its graph: profile, options, and a plugin's kernel."""
    parts = [_plain(profile), dataclasses.asdict(options)]
    return _digest([*parts, sha256(SOURCE)] if options.plugin else parts)


def graph_hash(path: str | Path, known: Mapping[str, str] | None = None) -> str:
    """sha256 over a graph file and every file of weights it refers to; `known` saves reading them."""
    path, known = Path(path), known or {}
    digest = hashlib.sha256()
    places = {weight.place[0] for weight in read_graph(path).weights.values() if weight.place}
    for file in (path, *(path.parent / name for name in sorted(places))):
        try:
            digest.update((known.get(file.name) or sha256(file)).encode())
        except OSError as error:
            raise VtpError(f"cannot read {file}: {error.strerror or error}") from error
    return digest.hexdigest()


def _largest_axes(path: str | Path, profiles: Profiles | None) -> dict[str, int]:
    """Names of dynamic axes with their largest size in any profile."""
    graph, axes = read_graph(path), dict[str, int]()
    for name, shapes in (item for profile in profile_list(profiles) for item in profile.items()):
        tensor = graph.tensors.get(name)
        for axis, size in zip(tensor.shape if tensor else (), shapes[2], strict=False):
            if isinstance(axis, str):
                axes[axis] = max(size, axes.get(axis, 0))
    return axes


def _check_room(name: str, needs: BuildMemory, room: Room) -> None:
    # What is needed of which memory, and how many times the weights are in it.
    parts = [("host memory", needs.host, room.host, _COPIES), ("GPU memory", needs.device, room.device, 1)]
    if room.shared:
        parts = [("this board's memory", needs.host + needs.device, room.host, _COPIES + bool(needs.device))]
    for what, wanted, free, copies in parts:
        if free and wanted > free:
            most = max(0, needs.weights - (wanted - free) // copies)
            raise VtpError(
                f"building {name} needs about {_gb(wanted)} GB of {what}, {_gb(free)} GB are free: "
                f"{_gb(most)} GB of weights would fit, these are {_gb(needs.weights)}; free memory, "
                "add swap, or export smaller weights (float16, quantised)"
            )


def _build_aside(
    path: Path, target: Path, profile: Profiles | None, options: BuildOptions, wanted: Stamp, step: Step
) -> Stamp:
    """Build into a hidden file, then swap in: first the engine, then the stamp that makes it count."""
    job = {
        "path": str(path),
        "engine": wanted.engine,
        "profile": _plain(profile),
        "options": dataclasses.asdict(options),
        "timing_cache": str(cache_folder() / f"{wanted.engine}-{wanted.version}-sm{wanted.sm}.timing"),
    }
    with whole_file(target) as part:
        made = run_build({**job, "output": str(part)}, step)
        stamp = dataclasses.replace(wanted, bytes=made["bytes"], sha256=made["sha256"])
        target.with_suffix(STAMP).unlink(missing_ok=True)
    return write_stamp(target, stamp)


def _plain(profiles: Profiles | None) -> list[dict[str, list[list[int]]]]:
    return [
        {name: [list(shape) for shape in shapes] for name, shapes in sorted(profile.items())}
        for profile in profile_list(profiles)
    ]


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}"
