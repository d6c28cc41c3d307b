"""Weights of a bundle's graphs: read where they lie, one at a time, and laid down once in a new folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

_INLINE_BYTES = 1024  # smaller tensors stay in the graph file
_PAGE, _LINE = 4096, 64  # memory mapping wants page boundaries; for small ones they would be mostly padding


def place_of(tensor: onnx.TensorProto) -> tuple[str, int, int] | None:
    """(file, offset, bytes) of a tensor in external data; None where the graph file holds it."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries.get("offset", 0)), int(entries["length"])


def read(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """The values of a tensor; those in external data are mapped, not loaded."""
    place = place_of(tensor)
    if place is None:
        return numpy_helper.to_array(tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / place[0], dtype, "r", place[1], tuple(tensor.dims))


class Store:
    """The external data of a bundle that is being written: equal bytes lie there once."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        self.folder = folder
        self._moved: dict[tuple[str, int, int], tuple[str, int, int]] = {}
        self._known: dict[str, tuple[str, int, int]] = {}

    def move(self, tensor: onnx.TensorProto, file: str) -> None:
        """Lay down a tensor of the source folder in `file`, unless an earlier graph did, and point at it."""
        place = place_of(tensor)
        if place is None:
            return
        if place not in self._moved:
            data = np.memmap(self.source / place[0], np.uint8, "r", place[1], (place[2],))
            self._moved[place] = self._append(data.data, file)
        _point(tensor, self._moved[place])

    def tensor(
        self, name: str, values: np.ndarray, kind: int, dims: list[int], file: str
    ) -> onnx.TensorProto:
        """A new tensor of ONNX type `kind` from its bytes; a small one stays in the graph file."""
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=dims)
        data = np.ascontiguousarray(values).tobytes()
        if len(data) < _INLINE_BYTES:
            tensor.raw_data = data
            return tensor
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._known:
            self._known[digest] = self._append(data, file)
        _point(tensor, self._known[digest])
        return tensor

    def _append(self, data: bytes | memoryview, file: str) -> tuple[str, int, int]:
        with (self.folder / file).open("ab") as out:
            unit = _PAGE if len(data) >= 16 * _PAGE else _LINE
            offset = -(-out.tell() // unit) * unit
            out.write(b"\0" * (offset - out.tell()))
            out.write(data)
        return file, offset, len(data)


def _point(tensor: onnx.TensorProto, place: tuple[str, int, int]) -> None:
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in zip(("location", "offset", "length"), place, strict=True):
        tensor.external_data.add(key=key, value=str(value))
