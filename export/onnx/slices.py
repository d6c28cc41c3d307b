"""A graph run in slices of layers: for checking a model that does not fit into memory as a whole.

ONNX Runtime's CPU provider turns float16 weights into float32 when it opens a graph, so that a 7B decoder
takes 27 GB. Cut between its layers, a few hundred MB are open at a time, and what flows from layer to layer
can be looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from vtp.engines import Engine, TensorSpec, Value, VtpError
from vtp.engines.ort.library import load_onnxruntime
from vtp.engines.ort.session import OrtEngine, OrtValue
from vtp.export.onnx.grouping import grouped

SLICE_BYTES = 1 << 27  # stored weights that are open at a time; a larger layer is a slice of its own


class SlicedEngine(Engine):
    """One graph behind the Engine interface; every run opens its slices one after the other.

    borders  layer -> the hidden states that went into it in the latest run; of the first layer, the graph's
             first input
    """

    def __init__(self, path: Path, layers: str = "", threads: int | None = None) -> None:
        """`layers` is what the names of the layers' weights start with, before their number; "" for none."""
        model = onnx.load(path, load_external_data=False)
        self.inputs = {value.name: _spec(value) for value in model.graph.input}
        self.outputs = {value.name: _spec(value) for value in model.graph.output}
        self.borders: dict[int, np.ndarray] = {}
        self._threads = threads
        cut = _Cut(model, layers)
        self._borders = cut.borders
        self._made = cut.write(path)
        self._files = self._made or [path]

    def put(self, array: np.ndarray) -> OrtValue:
        ort = load_onnxruntime()

        return OrtValue(ort.OrtValue.ortvalue_from_numpy(np.array(array, order="C", copy=True), "cpu", 0))

    def zeros(self, shape: Sequence[int], dtype: str) -> OrtValue:
        return self.put(np.zeros(shape, dtype))

    def run(self, feeds: Mapping[str, Value], into: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Run slice after slice, each open only while it runs; `borders` keeps what passes between."""
        values, into = dict(feeds), dict(into or {})
        for file in self._files:
            engine = OrtEngine(file, threads=self._threads)
            try:
                given = {name: into[name] for name in engine.outputs if name in into}
                found = engine.run({name: values[name] for name in engine.inputs}, given)
                # A value that ONNX Runtime made keeps the memory of its session, weights and all.
                values.update({name: into.get(name) or self.put(found[name].numpy()) for name in found})
                del found
            finally:
                engine.close()
        places = {0: next(iter(self.inputs)), **self._borders}
        self.borders = {layer: values[name].numpy() for layer, name in places.items()}
        return {name: values[name] for name in self.outputs}

    def close(self) -> None:
        """Remove the slices' files; the graph's own stay."""
        for file in self._made:
            file.unlink(missing_ok=True)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(value.name, dtype, tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim))


class _Cut:
    """Where a graph is cut. A node belongs to the last layer whose weights it depends on; -1: to none.

    borders  layer -> the value that goes into it: what the layer before computes and it reads
    """

    def __init__(self, model: onnx.ModelProto, layers: str) -> None:
        self.model = model
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.levels = self._find_levels(re.compile(re.escape(layers) + r"\.(\d+)\.") if layers else None)
        self.types = {
            value.name: value
            for values in (model.graph.value_info, model.graph.input, model.graph.output)
            for value in values
        }
        self.borders = self._find_borders()

    def write(self, path: Path) -> list[Path]:
        """One file per slice, beside the graph's; none for a graph that is better left whole."""
        groups = self._groups()
        if len(groups) < 2 and not self.borders:
            return []
        files = []
        for number, levels in enumerate(groups):
            files.append(path.with_name(f".{path.stem}.slice-{number}.onnx"))
            onnx.save(self._slice(set(levels)), files[-1])
        return files

    def _find_levels(self, pattern: re.Pattern[str] | None) -> list[int]:
        known: dict[str, int] = {}
        for name in self.weights:
            number = pattern.match(name) if pattern else None
            if number:
                known[name] = int(number[1])
        levels = []
        for node in self.model.graph.node:
            levels.append(max((known.get(name, -1) for name in node.input), default=-1))
            known.update(dict.fromkeys(node.output, levels[-1]))
        return levels

    def _last_readers(self) -> dict[str, int]:
        """Value -> the highest level of a node that reads it."""
        readers: dict[str, int] = {}
        for node, level in zip(self.model.graph.node, self.levels, strict=True):
            for name in node.input:
                readers[name] = max(level, readers.get(name, -1))
        return readers

    def _find_borders(self) -> dict[int, str]:
        """The first value of a layer that a later one reads: what else goes over is computed from it."""
        readers, borders = self._last_readers(), dict[int, str]()
        for node, level in zip(self.model.graph.node, self.levels, strict=True):
            for name in node.output:
                if level >= 0 and readers.get(name, -1) > level and self._is_float(name):
                    borders.setdefault(level + 1, name)
        return borders

    def _is_float(self, name: str) -> bool:
        known = self.types.get(name)
        floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        return known is not None and known.type.tensor_type.elem_type in floats

    def _groups(self) -> list[list[int]]:
        """Consecutive levels whose weights together stay below SLICE_BYTES."""
        sizes = dict.fromkeys(sorted(set(self.levels)), 0)
        for node, level in zip(self.model.graph.node, self.levels, strict=True):
            sizes[level] += sum(_bytes(self.weights[name]) for name in node.input if name in self.weights)
        return grouped(sizes, SLICE_BYTES)

    def _slice(self, levels: set[int]) -> onnx.ModelProto:
        graph = self.model.graph
        nodes = [node for node, level in zip(graph.node, self.levels, strict=True) if level in levels]
        others = [node for node, level in zip(graph.node, self.levels, strict=True) if level > max(levels)]
        made = {name for node in nodes for name in node.output}
        read = {name: None for node in nodes for name in node.input if name}  # in order, each once
        wanted = {name for node in others for name in node.input} | {value.name for value in graph.output}
        wanted |= set(self.borders.values())
        part = helper.make_graph(
            nodes,
            graph.name,
            [self._type(name) for name in read if name not in made and name not in self.weights],
            [self._type(name) for name in sorted(made & wanted)],
            [self.weights[name] for name in read if name in self.weights],
        )
        return helper.make_model(
            part, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )

    def _type(self, name: str) -> onnx.ValueInfoProto:
        if name not in self.types:
            raise VtpError(f"graph {self.model.graph.name} does not say what {name} is; it cannot be cut")
        return self.types[name]


def _bytes(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
