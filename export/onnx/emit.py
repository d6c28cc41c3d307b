"""Module -> ONNX graph: names, dtypes, dynamic axes, and one copy of every weight on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from vtp.engines import VtpError
from vtp.export.graphs.unfused import keep_transposes
from vtp.export.onnx.external_data import Streamed, refuse_made_up, stream
from vtp.export.onnx.lower import lower
from vtp.export.onnx.optimize import optimize
from vtp.export.onnx.shortcuts import shortcuts
from vtp.export.pruners.ops import onnx_translations, translating
from vtp.runtime.bundle.caches import FILLED

OPSET = 23
_INLINE_BYTES = 1024  # smaller tensors stay in the graph file
_ALIGNMENT = 4096  # memory mapping wants page boundaries
_READ = "u0"  # torch's symbol for the first size that a graph reads from a tensor


@dataclass(frozen=True)
class GraphInput:
    """One input: its name, an example tensor, and its dynamic axes as axis -> name."""

    name: str
    example: Tensor
    dynamic: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphSpec:
    """A module and the names of what goes in and comes out, in the order of its forward.

    output_axes   names for dynamic axes of outputs that no input has
    rewrite       whether pattern rules may run over the traced graph (see `optimize`)
    """

    name: str
    module: nn.Module
    inputs: list[GraphInput]
    outputs: list[str]
    output_axes: dict[str, dict[int, str]] = field(default_factory=dict)
    rewrite: bool = True


class WeightStore:
    """External data of one bundle: every distinct tensor is written once, whichever graphs use it.

    A graph's own tensors go to `<graph>.onnx.data`; a tensor that an earlier graph wrote (tied embeddings, a
    projection that two graphs read) is referenced where it lies. `filled` says whether the files hold
    numbers.
    """

    filled = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # (dtype, sha256), or the origin of a streamed tensor -> file, offset
        self._places: dict[tuple[Any, ...], tuple[str, int]] = {}

    def externalize(self, model: ir.Model, name: str) -> None:
        """Replace the large initializers of `model` by references into the store's files."""
        file = f"{name}.onnx.data"
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_BYTES:
                continue
            value.const_value = self._place(tensor, file, value.name or "")
        data = self.folder / file
        if data.exists() and not data.stat().st_size:
            data.unlink()  # every tensor lies in another graph's

    def _place(self, tensor: Any, file: str, name: str) -> ir.ExternalTensor:
        origin = tensor.origin if isinstance(tensor, Streamed) else None
        if origin is None or origin not in self._places:
            pieces = tensor.pieces() if isinstance(tensor, Streamed) else [tensor.tobytes()]
            offset, digest = self._append(file, pieces)
            identity = (str(tensor.dtype), digest)
            if identity in self._places:
                os.truncate(self.folder / file, offset)
            place = self._places.setdefault(identity, (file, offset))
            self._places[origin or identity] = place
        location, offset = self._places[origin or identity]
        return ir.ExternalTensor(
            location, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=self.folder
        )

    def _append(self, file: str, pieces: Iterable[Any]) -> tuple[int, str]:
        """Write buffers one after the other; where they start, and the sha256 of them all."""
        digest = hashlib.sha256()
        with (self.folder / file).open("ab") as out:
            offset = aligned(out.tell())
            out.write(b"\0" * (offset - out.tell()))
            for piece in pieces:
                digest.update(piece)
                out.write(piece)
        return offset, digest.hexdigest()


def aligned(offset: int) -> int:
    """Where the next tensor of a data file begins when the one before ends at `offset`."""
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def emit(spec: GraphSpec, store: WeightStore, opset: int = OPSET) -> Path:
    """Trace, translate and write one graph into the store's folder; returns its path."""
    model = _trace(spec, opset)
    stream(model)
    with _own_errors():
        optimize(model, spec.rewrite)
    lower(model, opset)
    keep_transposes(model)
    refuse_made_up(model, spec.name)
    _strip(model)
    _name_axes(model.graph, spec)
    store.externalize(model, spec.name)
    path = store.folder / f"{spec.name}.onnx"
    ir.save(model, path)
    return path


@contextmanager
def _own_errors() -> Iterator[None]:
    """A pass over a graph reads weights, and what is said of them comes wrapped: take it out again."""
    try:
        yield
    except ir.passes.PassError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, VtpError):
            cause = cause.__cause__
        raise (cause or error) from None


def _trace(spec: GraphSpec, opset: int) -> ir.Model:
    """torch.export and translate; VtpError in one line with the cause of what cannot be exported."""
    try:
        with _quiet(), translating(opset), shortcuts(), torch.no_grad():
            program = torch.onnx.export(
                spec.module.eval(),
                # Clones: torch.export takes two inputs that share a tensor for one.
                tuple(item.example.clone() for item in spec.inputs),
                dynamo=True,
                opset_version=opset,
                input_names=[item.name for item in spec.inputs],
                output_names=spec.outputs,
                dynamic_shapes=_dynamic_shapes(spec),
                custom_translation_table=onnx_translations(),
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:  # its own text is a page; the cause says what is wrong
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200]
        raise VtpError(
            f"graph {spec.name} cannot be exported: {type(cause).__name__}: {reason} (--debug shows where)"
        ) from error
    assert program is not None  # torch's signature: None only for the old exporter
    return program.model


def _dynamic_shapes(spec: GraphSpec) -> tuple[Any, ...]:
    """Every dynamic axis as Dim.DYNAMIC: never frozen to the example, and length 1 runs as well."""
    shapes = [dict.fromkeys(item.dynamic, torch.export.Dim.DYNAMIC) or None for item in spec.inputs]
    fixed = _positional_count(spec.module)
    return (*shapes[:fixed], tuple(shapes[fixed:])) if fixed < len(shapes) else tuple(shapes)


def _positional_count(module: nn.Module) -> int:
    """How many inputs `forward` names; the rest are gathered by its *args."""
    import inspect

    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return len(kinds)


def _name_axes(graph: ir.Graph, spec: GraphSpec) -> None:
    """Give inputs and outputs the axis names that users see (`batch`, `sequence`), not the tracer's."""
    named = {_READ: FILLED}
    for value, item in zip(graph.inputs, spec.inputs, strict=True):
        shape = list(value.shape or ())
        for axis, name in item.dynamic.items():
            named[str(shape[axis])] = name
        value.shape = ir.Shape([item.dynamic.get(axis, size) for axis, size in enumerate(shape)])
    for value in graph.outputs:
        chosen = spec.output_axes.get(value.name or "", {})
        value.shape = ir.Shape(
            [
                chosen.get(axis, size if isinstance(size, int) else named.get(str(size), str(size)))
                for axis, size in enumerate(value.shape or ())
            ]
        )
    _name_inner_axes(graph, named)


def _name_inner_axes(graph: ir.Graph, named: Mapping[str, str]) -> None:
    """Say inner shapes in the same names (`batch*sequence`): from them memory can be told beforehand."""
    outputs = set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value.shape is not None and value not in outputs:
                value.shape = ir.Shape([_renamed(size, named) for size in value.shape])


def _renamed(size: Any, named: Mapping[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    return re.sub(r"\w+", lambda symbol: named.get(symbol[0], symbol[0]), str(size))


def _strip(model: ir.Model) -> None:
    """Drop the tracer's notes (source lines, machine paths) from the graph."""
    model.doc_string = None
    model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in _nodes(model):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _nodes(model: ir.Model) -> Sequence[ir.Node]:
    return list(model.graph.all_nodes())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes from a user's terminal; failures still raise, and say it all."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
