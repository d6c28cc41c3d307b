"""Bundles of a full-size shape without their weights, in an archive of a few MB: what a GPU is measured with.

    python -m vtp.bench.gpu.pack [--shape llava-1.5-7b] [--out build/gpu-shape.tar.xz]

Writes no weights at any time, so a model of 14 GB is packed with little memory and disk. On the GPU machine
`vtp.bench.gpu.shape` fills the bundles with random numbers and measures them (CONTRIBUTING, "On a machine
with a GPU").
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vtp.bench.common.resident import peak_resident
from vtp.bench.shapes.weightless import export_weightless
from vtp.engines.disk.whole import whole_file
from vtp.export.cli import quiet_libraries
from vtp.export.exporter import Request
from vtp.runtime.commands.arguments import add_debug
from vtp.runtime.commands.console import Parser, Progress, run_command

# Folder of the archive -> method and keep-counts.
BUNDLES = {"none": ("none", None), "vispruner": ("vispruner", "192,64"), "adaptprune": ("adaptprune", "57")}
FOLDER = "gpu-shape"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        prog="python -m vtp.bench.gpu.pack", description="Pack a shape's bundles without their weights."
    )
    add = parser.add_argument
    add("--shape", default="llava-1.5-7b", help="full-size shape (default: %(default)s)")
    add("--out", default=f"build/{FOLDER}.tar.xz", metavar="FILE", help="the archive (default: %(default)s)")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("gpu_pack", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    quiet_libraries()
    out, progress = Path(args.out), Progress()
    with tempfile.TemporaryDirectory() as folder:
        for name, (method, keep) in BUNDLES.items():
            progress.step(f"export {name}, without weights")
            request = Request(Path(folder) / name, method=method, keep_tokens=keep, dtype="float16")
            export_weightless(args.shape, request)
        progress.step("pack")
        _pack(Path(folder), out)
    progress.end()
    peak = f"; at most {peak_resident() / 2**30:.1f} GiB of memory" if peak_resident() else ""
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB{peak}")


def _pack(folder: Path, out: Path) -> None:
    """The folder's bundles as FOLDER/NAME; the archive appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as aside, tarfile.open(aside, "w:xz") as archive:
        for name in BUNDLES:
            archive.add(folder / name, f"{FOLDER}/{name}")


if __name__ == "__main__":
    sys.exit(main())
