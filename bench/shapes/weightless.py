"""Bundles without weights: graphs and manifest of a shape, a few MB, to be filled where they are measured.

`WeightlessStore` takes the place of the WeightStore. What would go into data files is written down in a
weight map: which tensor of the model lies where, transposed or not. Anyone who has the numbers fills the
files by it (`vtp.bench.shapes.weight_map`, `vtp.bench.gpu.weights`). The manifest lists no data files,
for there are none yet.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from vtp.bench.shapes.models import write_weightless
from vtp.bench.shapes.weight_map import MODEL, Piece, is_small, write_manifest, write_weight_map
from vtp.engines import VtpError
from vtp.export.checkpoint.weights import Source
from vtp.export.exporter import Request, export
from vtp.export.onnx.emit import WeightStore, aligned
from vtp.export.onnx.external_data import Streamed
from vtp.export.patched import patched
from vtp.runtime.bundle.folder import Bundle


class WeightlessStore(WeightStore):
    """Gives every weight its place in a file that is one hole; other constants stay in the graph files."""

    filled = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pieces: list[Piece] = []
        self._ends: dict[str, int] = {}
        self._given: dict[tuple[object, ...], Piece] = {}

    def externalize(self, model: ir.Model, name: str) -> None:
        """Replace the streamed initializers of `model` by references into files that are still empty."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, Streamed):
                continue
            piece = self._piece(tensor, f"{name}.onnx.data")
            value.const_value = ir.ExternalTensor(
                piece.file,
                piece.offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name or "",
                base_dir=self.folder,
            )
        for file, end in self._ends.items():
            with (self.folder / file).open("ab") as out:
                out.truncate(end)

    def _piece(self, tensor: Streamed, file: str) -> Piece:
        if tensor.origin not in self._given:
            offset = aligned(self._ends.get(file, 0))
            self._ends[file] = offset + tensor.nbytes
            source = tensor.source
            piece = Piece(file, offset, source.name, source.shape, tensor.transposed)
            self._given[tensor.origin] = piece
            self.pieces.append(piece)
        return self._given[tensor.origin]


def _view(view: Callable[[Source], Tensor]) -> Callable[[Source], Tensor]:
    """`Source.view` for what has numbers: an export that reads a hole would write its zeros into a graph."""

    def checked(source: Source) -> Tensor:
        if not is_small(source.shape):
            raise VtpError(
                f"the export looked at the numbers of {source.name}, which a weightless model does not have"
            )
        return view(source)

    return checked


def export_weightless(
    shape: str, request: Request, progress: Callable[[str], None] = lambda _: None
) -> Bundle:
    """Export a shape without weights, by `request` (its model and verify are not looked at).

    The bundle holds its weight map and config.json beside the graphs (`vtp.bench.shapes.weight_map`). Raises
    as `export` and `write_weightless` do.
    """
    stores: list[WeightlessStore] = []

    def store(folder: Path) -> WeightlessStore:
        stores.append(WeightlessStore(folder))
        return stores[-1]

    with tempfile.TemporaryDirectory() as aside:
        model = write_weightless(shape, Path(aside) / shape, request.dtype or "float16")
        with patched(Source, "view", _view(Source.view)):
            bundle = export(replace(request, model=str(model), verify="none"), progress, store)
        shutil.copyfile(model / "config.json", bundle.path(MODEL))
    write_weight_map(bundle.folder, stores[-1].pieces)
    _drop_holes(bundle, {piece.file for piece in stores[-1].pieces})
    return bundle


def _drop_holes(bundle: Bundle, files: Collection[str]) -> None:
    """Take empty data files out of a bundle and its manifest: they are written where they are measured."""
    rest = {name: info for name, info in bundle.manifest.files.items() if name not in files}
    for name in files:
        bundle.path(name).unlink()
    write_manifest(bundle.folder, replace(bundle.manifest, files=rest))
