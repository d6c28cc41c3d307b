"""Graphs and their weights as files that transformers.js finds: NAME.onnx, NAME.onnx_data, .onnx_data_1, …

Source: src/utils/model-loader.js of npm @huggingface/transformers 4.3.2. config.json says how many data files
a graph has; in a browser nothing else can be read, so a graph names no other graph's files. A table that two
graphs read (tied embeddings) is a data file of its own under two names, one file on the disk.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import onnx_ir as ir

from vtp.export.onnx.emit import aligned
from vtp.export.onnx.grouping import grouped

LIMIT = 2_000_000_000  # bytes of one data file: a browser reads it into one buffer
_SHARED = 1 << 20  # smaller tensors that two graphs read are written for each
_PIECE = 1 << 24

Place = tuple[str, int, int]  # of a tensor among the bundle's files: path, offset, bytes


def save(models: Mapping[str, ir.Model], folder: Path, limit: int = LIMIT) -> dict[str, int]:
    """Write graphs and weights into `folder`; returns how many data files each graph has, by its file."""
    readers = Counter(place for model in models.values() for place in _places(model))
    shared = {place for place, count in readers.items() if count > 1 and place[2] >= _SHARED}
    files = _Files(folder, limit)
    return {f"{name}.onnx": files.save(model, f"{name}.onnx", shared) for name, model in models.items()}


def _places(model: ir.Model) -> set[Place]:
    return {_place(tensor) for tensor in _external(model)}


def _external(model: ir.Model) -> Iterable[ir.ExternalTensor]:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value


def _place(tensor: ir.ExternalTensor) -> Place:
    return str(tensor.path), tensor.offset or 0, tensor.nbytes


@dataclass
class _Files:
    """The data files of a folder; `lone` are those that hold one shared tensor."""

    folder: Path
    limit: int
    lone: dict[Place, Path] = field(default_factory=dict)

    def save(self, model: ir.Model, file: str, shared: set[Place]) -> int:
        """Write one graph and its weights; returns how many data files it has."""
        places = _places(model)
        sizes = {place: aligned(place[2]) for place in sorted(places - shared)}
        groups = [group for group in grouped(sizes, self.limit) if group]
        groups += [[place] for place in sorted(places & shared)]
        found: dict[Place, tuple[str, int]] = {}
        for number, group in enumerate(groups):
            name = f"{file}_data" + (f"_{number}" if number else "")
            found.update(self._write(name, group, shared))
        self._point(model, found)
        ir.save(model, self.folder / file)
        return len(groups)

    def _write(self, name: str, group: list[Place], shared: set[Place]) -> dict[Place, tuple[str, int]]:
        path = self.folder / name
        if group[0] not in shared:
            return {place: (name, offset) for place, offset in _copy(group, path).items()}
        if group[0] in self.lone:
            _link(self.lone[group[0]], path)
        else:
            _copy(group, path)
            self.lone[group[0]] = path
        return {group[0]: (name, 0)}

    def _point(self, model: ir.Model, found: Mapping[Place, tuple[str, int]]) -> None:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                name, offset = found[_place(tensor)]
                value.const_value = ir.ExternalTensor(
                    name,
                    offset,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=value.name or "",
                    base_dir=self.folder,
                )


def _copy(group: Iterable[Place], target: Path) -> dict[Place, int]:
    """Copy tensors one after the other, each to a page's border; returns where they start."""
    offsets: dict[Place, int] = {}
    with target.open("wb") as out:
        for place in group:
            source, start, size = place
            offsets[place] = aligned(out.tell())
            out.write(b"\0" * (offsets[place] - out.tell()))
            with Path(source).open("rb") as given:
                given.seek(start)
                _pour(given, out, size)
    return offsets


def _pour(given: IO[bytes], out: IO[bytes], size: int) -> None:
    while size:
        piece = given.read(min(size, _PIECE))
        if not piece:
            raise OSError(f"{given.name} is shorter than its graph says")
        out.write(piece)
        size -= len(piece)


def _link(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the disk has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
