"""Looks at a graph file of a stranger before any library opens it: where it reads, and what it may run.

ONNX Runtime and TensorRT read weights wherever a graph says, and run whatever it holds. What vtp's exporter
writes needs little of that, so the rest is refused: weights outside the files that are known, operators of
other domains, control flow (a loop of 2^62 rounds never ends), functions, random numbers. Every occurrence of
a field counts: protocol buffer parsers merge messages that are said twice.

Not bounded here: the sizes of tensors that operators compute. A graph that asks for more memory than there
is ends in ONNX Runtime's one-line error, or in a process that the system ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

from vtp.engines.disk.files import read_bounded
from vtp.engines.errors import VtpError
from vtp.engines.graph.file import GRAPH_BYTES, Buffer, bits_of, fields, integers, message_of, text_of

# Beside the standard domain: what the exporter and vtp-calib write. Others of this domain read files
# (EPContext) or hold graphs (BeamSearch).
_MICROSOFT = {
    "DequantizeLinear",
    "GroupQueryAttention",
    "LinearAttention",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QuantizeLinear",
}
_STANDARD = ("", "ai.onnx")
_FLOW = {"If", "Loop", "Scan", "SequenceMap"}
_RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
# Of nodes, names and shapes, without weights; the graphs of a 7B model have about 1 MB. Reading takes seconds
# for what is allowed.
_STRUCTURE = 16 << 20
_FIELD = 16  # bytes that a message or a field of a weight counts for, beside what it holds
_DATA = {4, 5, 6, 7, 9, 10, 11}  # TensorProto: its values, by type
_PER_BYTE = 16  # elements that a byte of a TensorProto can hold, and more than any type has
_RANK = 64  # as numpy
_PLACE = {"location", "offset", "length", "checksum"}

# Field numbers of onnx.proto: ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto.
_GRAPH, _TRAINING, _FUNCTIONS = 7, 20, 25
_NODES, _WEIGHTS, _SPARSE = 1, 5, 15
_OPERATOR, _ATTRIBUTE, _DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
_DIMS, _TYPE, _EXTERNAL = 1, 2, 13


class _Refused(VtpError):
    """What is wrong with a graph, without the name of its file."""


def check_graph(path: str | Path, files: Mapping[str, int]) -> None:
    """Refuse a graph that reads or runs what vtp's exporter never writes.

    `files` are the files beside it that it may read weights from, with their sizes in bytes. Raises VtpError,
    in one line, for anything else, and for a file that is not a graph.
    """
    path = Path(path)
    if path.suffix != ".onnx":  # ONNX Runtime reads .ort as another format, which is not looked at here
        raise VtpError(f"graph {path.name} is not named .onnx; do not use this bundle")
    data = read_bounded(path, GRAPH_BYTES)
    try:
        _check_model(memoryview(data), files)
    except _Refused as error:
        raise VtpError(f"{path.name} {error}; vtp writes no such graph: do not use this bundle") from error
    except (ValueError, IndexError, TypeError) as error:
        raise VtpError(f"{path} is not an ONNX graph; export the bundle again") from error


def _check_model(data: Buffer, files: Mapping[str, int]) -> None:
    graphs = 0
    for number, value in fields(data):
        if number == _GRAPH:
            graphs += 1
            _refuse(graphs > 1, "holds two graphs")
            _check_graph(message_of(value), files)
        _refuse(number == _FUNCTIONS, "holds functions")
        _refuse(number == _TRAINING, "holds training graphs")
    if not graphs:
        raise ValueError("no graph")


def _check_graph(data: Buffer, files: Mapping[str, int]) -> None:
    structure = 0
    for number, value in fields(data):
        _refuse(number == _SPARSE, "has sparse weights")
        if number == _WEIGHTS:
            structure += _check_tensor(message_of(value), files)
        else:
            structure += _FIELD if isinstance(value, int) else _FIELD + len(value)
        _refuse(structure > _STRUCTURE, f"has more than {_STRUCTURE >> 20} MB of nodes and names")
        if number == _NODES:
            _check_node(message_of(value), files)


def _check_node(data: Buffer, files: Mapping[str, int]) -> None:
    said: dict[int, set[str]] = {_OPERATOR: set(), _DOMAIN: set()}
    for number, value in fields(data):
        if number in said:
            said[number].add(text_of(value))
        elif number == _ATTRIBUTE:
            _check_attribute(message_of(value), files)
    for domain in said[_DOMAIN] or {""}:
        for operator in said[_OPERATOR]:
            _check_operator(domain, operator)


def _check_operator(domain: str, operator: str) -> None:
    known = domain in _STANDARD or (domain == "com.microsoft" and operator in _MICROSOFT)
    _refuse(not known, f"has the operator {_short(domain)}::{_short(operator)}")
    _refuse(operator in _FLOW, f"has control flow ({operator})")
    _refuse(operator in _RANDOM, f"has random numbers ({operator})")


def _check_attribute(data: Buffer, files: Mapping[str, int]) -> None:
    for number, value in fields(data):
        _refuse(number in _ATTRIBUTE_GRAPHS, "has a graph within a node (control flow)")
        _refuse(number in _ATTRIBUTE_SPARSE, "has a sparse tensor")
        if number in _ATTRIBUTE_TENSORS:
            _check_tensor(message_of(value), files)


def _check_tensor(data: Buffer, files: Mapping[str, int]) -> int:
    """Hold a TensorProto against its data; returns the bytes of it that are not values."""
    shape: list[int] = []
    kind, structure, place = 0, 0, dict[str, str]()
    for number, value in fields(data):
        structure += _FIELD if isinstance(value, int) or number in _DATA else _FIELD + len(value)
        if number == _DIMS:
            shape += integers(value)
        elif number == _TYPE:
            kind = _number(value)
        elif number == _EXTERNAL:
            _add_entry(place, message_of(value))
    _refuse(len(shape) > _RANK, f"has a weight of {len(shape)} axes")
    _refuse(any(axis < 0 for axis in shape), "has a weight with a negative axis")
    if place:
        _check_place(place, kind, prod(shape), files)
    else:
        _refuse(
            prod(shape) > _PER_BYTE * len(data), f"has a weight of shape {_short(shape)} without its values"
        )
    return structure


def _add_entry(place: dict[str, str], data: Buffer) -> None:
    """One pair of a TensorProto's external_data."""
    pair = dict(fields(data))
    key, value = (text_of(pair.get(number, b"")) for number in (1, 2))
    _refuse(key in place or key not in _PLACE, f"says '{_short(key)}' of a weight outside the file")
    place[key] = value


def _check_place(place: Mapping[str, str], kind: int, count: int, files: Mapping[str, int]) -> None:
    name = place.get("location", "")
    _refuse(name not in files, f"reads weights from '{_short(name)}', which is not one of the bundle's files")
    offset, length = (_whole(place.get(key, "0")) for key in ("offset", "length"))
    bits = bits_of(kind)
    _refuse(bits is None, f"has weights of the unknown type {kind}")
    needed = -(-count * (bits or 0) // 8)
    _refuse(
        "length" in place and length != needed, f"has a weight of {length} bytes that needs {_short(needed)}"
    )
    _refuse(offset + needed > files[name], f"reads beyond the end of {name}, which has {files[name]} bytes")


def _whole(text: str) -> int:
    _refuse(not (text.isascii() and text.isdecimal() and len(text) < 20), f"has a weight at '{_short(text)}'")
    return int(text)


def _number(value: int | Buffer) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number belongs")
    return value


def _short(what: object) -> str:
    text = ascii(what) if not isinstance(what, str) else ascii(what)[1:-1]
    return text if len(text) <= 60 else f"{text[:60]}..."


def _refuse(wrong: bool, why: str) -> None:
    if wrong:
        raise _Refused(why)
