"""Reads an .onnx file without the onnx package: its tensors, nodes and weights, as far as engines need them.

A graph file is a protocol buffer; this walks the few fields wanted (numbers from onnx.proto) and skips the
rest. Weights are counted, not read, but for small ones within the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vtp.engines.disk.files import read_bounded
from vtp.engines.errors import VtpError

# TensorProto.DataType -> numpy's name (ONNX's own where numpy has none), and bits per element.
_DTYPES = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    16: ("bfloat16", 16),
    17: ("float8e4m3fn", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
}
_BITS = dict(_DTYPES.values())
_FLOAT64 = 11
_UNNAMED = "?"  # an axis of which the file says nothing
_SMALL = 64  # bytes of a constant that is kept
GRAPH_BYTES = (1 << 31) - 1  # the most that a protocol buffer may have
_LAST = (1 << 64) - 1
_TAG = (1 << 32) - 1  # likewise a field's number with its kind

Buffer = bytes | memoryview
Data = TypeVar("Data", bound=bytes | memoryview)


@dataclass(frozen=True)
class TensorShape:
    """dtype and shape of a tensor; a dynamic axis is a name or an expression of names."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Weight:
    """A constant of the graph. `place` is (file, offset) in external data, None inside the graph file.

    `raw` is the content of a small one inside the file, as it is stored.
    """

    dtype: str
    shape: tuple[int, ...]
    place: tuple[str, int] | None
    raw: bytes = b""

    @property
    def bytes(self) -> int:
        """Size as stored."""
        return size_of(self.dtype, self.shape)


@dataclass(frozen=True)
class Node:
    """One operator; `ints` holds its whole-number attributes, `texts` those that are words."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ints: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphFile:
    """What a graph file says; `tensors` holds inputs, outputs and inner tensors with a known shape."""

    opsets: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    weights: dict[str, Weight]
    tensors: dict[str, TensorShape]


def computes_float64(graph: GraphFile) -> bool:
    """Whether a graph holds or makes float64 numbers, as far as its file says."""
    held = {one.dtype for one in graph.weights.values()} | {one.dtype for one in graph.tensors.values()}
    casts = (node.ints.get("to") == _FLOAT64 for node in graph.nodes if node.op == "Cast")
    return "float64" in held or any(casts)


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    count = 1
    for axis in shape:
        count *= axis
    return -(-count * _BITS.get(dtype, 32) // 8)


def read_graph(path: str | Path) -> GraphFile:
    """Read a graph file. Raises VtpError when it is not one."""
    path = Path(path)
    try:
        return _model(memoryview(read_bounded(path, GRAPH_BYTES)))
    except (ValueError, IndexError, KeyError, struct.error, TypeError, AttributeError) as error:
        raise VtpError(f"{path} is not an ONNX graph; export the bundle again") from error


def fields(data: Data) -> Iterator[tuple[int, int | Data]]:
    """Field numbers and values of one message: an int for numbers, bytes for everything with a length.

    Raises ValueError or IndexError for anything that is not a protocol buffer.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if key > _TAG or not number:  # libraries differ in what they take such a one for
            raise ValueError("not a field")
        if kind == 0:
            value: Any
            value, place = _varint(data, place)
        elif kind == 2:
            length, place = _varint(data, place)
            if place + length > len(data):
                raise ValueError("cut off")
            value, place = data[place : place + length], place + length
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
            if place + length > len(data):
                raise ValueError("cut off")
            value, place = data[place : place + length], place + length
        else:
            raise ValueError("not a protocol buffer")
        yield number, value


def _varint(data: Buffer, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number & _LAST, place
        if shift > 63:
            raise ValueError("not a number")


def signed(number: int) -> int:
    """The int64 that a varint stands for."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _model(data: Buffer) -> GraphFile:
    opsets: dict[str, int] = {}
    graph: Buffer | None = None
    for number, value in fields(data):
        if number == 7:
            graph = message_of(value)
        elif number == 8:
            parts = dict(fields(message_of(value)))
            opsets[text_of(parts.get(1, b""))] = int(parts.get(2, 0))
    if graph is None:
        raise ValueError("no graph")
    return _graph(graph, opsets)


def _graph(data: Buffer, opsets: dict[str, int]) -> GraphFile:
    nodes: list[Node] = []
    weights: dict[str, Weight] = {}
    named: dict[int, list[str]] = {11: [], 12: [], 13: []}  # inputs, outputs, inner tensors
    tensors: dict[str, TensorShape] = {}
    for number, value in fields(data):
        if number == 1:
            nodes.append(_node(message_of(value)))
        elif number == 5:
            name, weight = _weight(message_of(value))
            weights[name] = weight
        elif number in named:
            name, tensor = _value_info(message_of(value))
            named[number].append(name)
            if tensor is not None:
                tensors[name] = tensor
    return GraphFile(opsets, tuple(named[11]), tuple(named[12]), tuple(nodes), weights, tensors)


def _node(data: Buffer) -> Node:
    said: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: [], 7: []}
    ints: dict[str, int] = {}
    texts: dict[str, str] = {}
    for number, value in fields(data):
        if number in said:
            said[number].append(text_of(value))
        elif number == 5:
            attribute = dict(fields(message_of(value)))
            if attribute.get(20) == 2:  # AttributeProto.INT
                ints[text_of(attribute[1])] = signed(int(attribute.get(3, 0)))
            elif attribute.get(20) == 3:  # STRING
                texts[text_of(attribute[1])] = text_of(attribute.get(4, b""))
    last = {number: "".join(said[number][-1:]) for number in (3, 4, 7)}
    return Node(last[4], last[7], last[3], tuple(said[1]), tuple(said[2]), ints, texts)


def _weight(data: Buffer) -> tuple[str, Weight]:
    shape: list[int] = []
    name, kind, raw, outside = "", 0, b"", dict[str, str]()
    for number, value in fields(data):
        if number == 1:
            shape += integers(value)
        elif number == 2:
            kind = int(value)
        elif number == 8:
            name = text_of(value)
        elif number in (4, 9) and not isinstance(value, int) and len(value) <= _SMALL:
            raw = bytes(value)  # packed floats lie as raw ones do
        elif number == 13:
            pair = dict(fields(message_of(value)))
            outside[text_of(pair[1])] = text_of(pair[2])
    place = (outside["location"], int(outside.get("offset", 0))) if outside else None
    return name, Weight(_dtype(kind), tuple(shape), place, raw)


def message_of(value: int | Buffer) -> Buffer:
    """A field's bytes; ValueError for a number (of which `bytes` would make as many zeros)."""
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def integers(value: int | Buffer) -> list[int]:
    """A repeated int64: one number, or several packed in bytes."""
    if isinstance(value, int):
        return [signed(value)]
    numbers, place = [], 0
    while place < len(value):
        number, place = _varint(value, place)
        numbers.append(signed(number))
    return numbers


def _value_info(data: Buffer) -> tuple[str, TensorShape | None]:
    parts = dict(fields(data))
    name = text_of(parts.get(1, b""))
    kind = dict(fields(message_of(parts.get(2, b"")))).get(1)  # TypeProto.tensor_type
    if kind is None:
        return name, None
    tensor = dict(fields(message_of(kind)))
    if 2 not in tensor:
        return name, None
    axes: list[int | str] = []
    for number, value in fields(message_of(tensor[2])):
        if number == 1:
            axis = dict(fields(message_of(value)))
            axes.append(text_of(axis[2]) if 2 in axis else int(axis[1]) if 1 in axis else _UNNAMED)
    return name, TensorShape(_dtype(int(tensor.get(1, 0))), tuple(axes))


def bits_of(kind: int) -> int | None:
    """Bits of one element of a TensorProto's type; None for one that is not known here."""
    return _DTYPES[kind][1] if kind in _DTYPES else None


def _dtype(kind: int) -> str:
    return _DTYPES.get(kind, (f"onnx type {kind}", 32))[0]


def text_of(value: int | Buffer) -> str:
    """A field's text; ValueError where it is none."""
    return "" if isinstance(value, int) else bytes(value).decode("utf-8")
