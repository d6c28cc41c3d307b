"""Opens a bundle's graphs: the file itself with ONNX Runtime, what vtp-build made of it with TensorRT."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vtp.engines import Engine, VtpError, capabilities, open_graph
from vtp.engines.tensorrt.store import cache_folder
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.stream_info import STREAM
from vtp.runtime.shell import command_line

NEVER_RUN = (
    "the code that runs TensorRT engines was never run on a GPU by those who wrote it; "
    "every engine was compared with ONNX Runtime on this machine"
)
NEVER_TRIED = (
    "{engine} was never tried by those who wrote its code; compare its answers with those of --engine ort-cpu"
)


@dataclass(frozen=True)
class Opening:
    """How graphs are opened.

    engines           folder of built TensorRT engines; None: in the user's cache
    allow_cpu_nodes   on CUDA, go on even if nodes are left to the CPU
    cuda_graph        on CUDA, record image stages and single steps as CUDA graphs and replay them
    image             who else runs the image stages: keep-count and pixel_values -> tensors by the
                      pipeline's names; their graphs are then not opened here
    elsewhere         graph file -> engine, for graphs that another engine of the same device runs
    wrapped           graph file -> what is made of its opened graph, and takes its place
    stream_reuse      take pictures for a camera's, one after the other: the tower recomputes what changed
    """

    engines: Path | None = None
    allow_cpu_nodes: bool = False
    cuda_graph: bool = False
    image: Callable[[int, np.ndarray], Mapping[str, np.ndarray]] | None = None
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    wrapped: Mapping[str, Callable[[Engine], Engine]] = field(default_factory=dict)
    stream_reuse: bool = False

    @property
    def skipped(self) -> frozenset[str]:
        """The moments whose graphs are not opened."""
        moments = {"image": self.image is not None, STREAM: not self.stream_reuse}
        return frozenset(moment for moment, skips in moments.items() if skips)


def every_graph(bundle: Bundle) -> Opening:
    """A way to open a bundle with all its graphs, those of a camera's later pictures among them."""
    return Opening(stream_reuse=bundle.manifest.stream is not None)


def open_stage(
    bundle: Bundle, file: str, engine: str, threads: int | None = None, how: Opening | None = None
) -> Engine:
    """Open one graph of a bundle, on `engine` unless `how` says another.

    Raises VtpError for what cannot be opened; for TensorRT: nothing built, built for something else, cut off,
    never compared with ONNX Runtime here, or found to differ.
    """
    how = how or Opening()
    opened = _open(bundle, file, how.elsewhere.get(file, engine), threads, how)
    return how.wrapped[file](opened) if file in how.wrapped else opened


def _open(bundle: Bundle, file: str, engine: str, threads: int | None, how: Opening) -> Engine:
    if not capabilities(engine).built:
        return open_graph(
            bundle.path(file),
            engine,
            threads,
            allow_cpu_nodes=how.allow_cpu_nodes,
            cuda_graph=how.cuda_graph,
        )
    from vtp.engines.tensorrt.build import check_gate, find_engine

    folder, rebuild = engines_folder(bundle, how.engines), build_command(bundle, engine, how.engines)
    known = {name: info.sha256 for name, info in bundle.manifest.files.items()}
    plan, stamp = find_engine(bundle.path(file), engine, folder, rebuild, known)
    check_gate(plan, stamp, rebuild)
    return open_graph(bundle.path(file), engine, plan=plan)


def engines_folder(bundle: Bundle, wanted: Path | None = None) -> Path:
    """Where a bundle's engines lie: `wanted`, else a folder of the user's cache for bundles of these files.

    Raises VtpError for a folder within the bundle: engines are a machine's, and bundles go to others.
    """
    if wanted is None:
        files = sorted((name, info.sha256) for name, info in bundle.manifest.files.items())
        return cache_folder() / hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    if wanted.resolve().is_relative_to(bundle.folder.resolve()):
        raise VtpError(f"{wanted} lies in the bundle, where no engine is opened; choose a folder elsewhere")
    return wanted


def build_command(bundle: Bundle, engine: str, folder: Path | None = None) -> str:
    """What a user types to build and compare a bundle's engines."""
    kept: list[str | Path] = ["-o", folder] if folder else []
    return command_line("vtp-build", bundle.origin or bundle.folder, "--engine", engine, *kept)
