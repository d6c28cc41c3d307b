"""Writes small ONNX graphs without the onnx package, which a machine that only runs bundles does not have.

A model is a protocol buffer; the numbers of fields are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

__all__ = ["Node", "write_graph"]

Node = tuple[str, Sequence[str], Sequence[str]]  # operator, inputs, outputs

_OPSET, _IR = 21, 10
_KINDS = {"float32": 1, "int64": 7, "float16": 10}  # TensorProto.DataType
_EXTERNAL = 1  # TensorProto.DataLocation
_INLINE = 1024  # bytes; axes must lie in the graph itself


def write_graph(
    path: Path, nodes: Iterable[Node], weights: dict[str, np.ndarray], dtype: str, names: Sequence[str]
) -> Path:
    """Write a graph from input "x" to output "y", both of `dtype` [names[0], ...]; returns `path`.

    weights  float32, float16 or int64; large ones are kept beside it, in `path`.data
    names    of the dimensions: rows, those of x, those of y
    """
    tensors, offset = [], 0
    with Path(f"{path}.data").open("wb") as file:
        for name, array in weights.items():
            if array.nbytes < _INLINE:
                tensors.append(_tensor(name, array) + _field(9, array.tobytes()))
            else:
                tensors.append(_tensor(name, array) + _elsewhere(array, f"{path.name}.data", offset))
                offset += file.write(array.tobytes())
    graph = b"".join(
        [
            *(_field(1, _node(*node)) for node in nodes),
            _field(2, path.stem),
            *(_field(5, tensor) for tensor in tensors),
            _field(11, _value("x", dtype, [names[0], names[1]])),
            _field(12, _value("y", dtype, [names[0], names[2]])),
        ]
    )
    path.write_bytes(_field(1, _IR) + _field(7, graph) + _field(8, _field(1, "") + _field(2, _OPSET)))
    return path


def _node(operator: str, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    ends = [*(_field(1, name) for name in inputs), *(_field(2, name) for name in outputs)]
    return b"".join(ends) + _field(4, operator)


def _tensor(name: str, array: np.ndarray) -> bytes:
    """An initializer's name, shape and type."""
    shape = b"".join(_field(1, size) for size in array.shape)
    return shape + _field(2, _KINDS[array.dtype.name]) + _field(8, name)


def _elsewhere(array: np.ndarray, file: str, offset: int) -> bytes:
    """Where in another file the bytes of an initializer lie."""
    where = {"location": file, "offset": str(offset), "length": str(array.nbytes)}
    parts = [_field(13, _field(1, key) + _field(2, text)) for key, text in where.items()]
    return b"".join(parts) + _field(14, _EXTERNAL)


def _value(name: str, dtype: str, sizes: Sequence[str]) -> bytes:
    """A graph's input or output, with a name for each dimension."""
    shape = b"".join(_field(1, _field(2, size)) for size in sizes)
    return _field(1, name) + _field(2, _field(1, _field(1, _KINDS[dtype]) + _field(2, shape)))


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field: a number as a varint, text and messages with their length before them."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
