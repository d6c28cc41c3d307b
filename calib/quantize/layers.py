"""The layers of a graph that can be quantised, and the graph with some of them in fewer bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from vtp.calib.quantize.rounding import INT8, Blocks, Range, int4_blocks, int8_channels, nearest_blocks
from vtp.calib.quantize.weight_store import Store, place_of, read

_FLOATS: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}
_MICROSOFT = "com.microsoft"
# What every dynamic product of a graph shares, by name: int8 codes around 128, of which one is a row's scale.
_ONE, _ZERO, _STEP, _LEAST, _LAST = (
    f"int8_rows__{part}" for part in ("one", "zero", "step", "least", "last")
)
_TINY = 1e-30  # a row of zeros has this size, so that nothing is divided by nothing
_COMPUTE_INT8 = 4  # MatMulNBits' accuracy level: activations in int8 while multiplying

Place = tuple[str, int, int] | str


@dataclass(frozen=True)
class Layer:
    """A MatMul or Gemm with a constant weight.

    source      the tensor that goes in [..., K]
    output      the tensor that comes out [..., N]
    weight      the initializer's name, [K,N], or [N,K] where `transposed`
    place       (file, offset, bytes) of the weight: layers that share it are one
    """

    file: str
    node: str
    source: str
    output: str
    weight: str
    place: Place
    shape: tuple[int, int]  # K, N
    transposed: bool
    dtype: str

    @property
    def stem(self) -> str:
        """What new names of the weight begin with."""
        return f"{self.weight}_transposed" if self.transposed else self.weight

    @property
    def label(self) -> str:
        """Its name for people."""
        return f"{Path(self.file).stem}/{self.node} [{self.shape[0]}x{self.shape[1]}]"


def load_graph(path: Path) -> onnx.ModelProto:
    """A graph without its external data."""
    return onnx.load(path, load_external_data=False)


def find_layers(model: onnx.ModelProto, file: str) -> list[Layer]:
    """Every layer of a graph, in its order."""
    weights = {item.name: item for item in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.domain == "" and len(node.input) > 1:
            weight = weights.get(node.input[1])
            if weight is not None and _fits(node, weight):
                layers.append(_layer(file, node, weight))
    return layers


def _fits(node: onnx.NodeProto, weight: onnx.TensorProto) -> bool:
    if len(weight.dims) != 2 or weight.data_type not in _FLOATS or node.input[0] == node.input[1]:
        return False
    plain = _attribute(node, "alpha", 1.0) == 1 and not _attribute(node, "transA", 0)
    return node.op_type == "MatMul" or (plain and (len(node.input) < 3 or _attribute(node, "beta", 1.0) == 1))


def _attribute(node: onnx.NodeProto, name: str, otherwise: float) -> float:
    found = [helper.get_attribute_value(item) for item in node.attribute if item.name == name]
    return found[0] if found else otherwise


def _layer(file: str, node: onnx.NodeProto, weight: onnx.TensorProto) -> Layer:
    transposed = node.op_type == "Gemm" and bool(_attribute(node, "transB", 0))
    rows, columns = reversed(weight.dims) if transposed else weight.dims
    place = place_of(weight) or f"{file}:{weight.name}"
    dtype = _FLOATS[weight.data_type]
    shape = (int(rows), int(columns))
    return Layer(file, node.name, node.input[0], node.output[0], weight.name, place, shape, transposed, dtype)


@dataclass(frozen=True)
class Int8:
    """A layer with int8 weights per channel, and int8 (or uint8) activations by one scale."""

    layer: Layer
    range: Range
    activations: str  # "int8", or "uint8" around 128, which is the same numbers
    target: str

    @property
    def domain(self) -> str:
        """Whose QuantizeLinear and DequantizeLinear: ONNX Runtime's own for its target.

        Its graphs have opset 23, for whose QuantizeLinear ONNX Runtime 1.23 has no kernel. ONNX Runtime's own
        operators of these names have one in every version, compute the same and are fused alike.
        """
        return _MICROSOFT if self.target == "ort" else ""


@dataclass(frozen=True)
class Int4:
    """A layer with int4 weights in blocks; `energy` [K] are the sums of squares of what goes in.

    nearest  round to the nearest, instead of searching each block's scale by the energy
    """

    layer: Layer
    energy: np.ndarray
    block: int
    target: str
    nearest: bool = False

    def blocks(self, weight: np.ndarray) -> Blocks:
        """The codes of the layer's weight [K,N], or of some of its columns."""
        if self.nearest:
            return nearest_blocks(weight, self.block, self.layer.dtype)
        return int4_blocks(weight, self.energy, self.block, self.layer.dtype, self.target != "ort")


@dataclass(frozen=True)
class DynamicInt8:
    """A layer with int8 weights per channel; what goes in is rounded while the graph runs, each row [K] by
    its own largest magnitude. For ONNX Runtime's CPU provider, in float32."""

    layer: Layer


Change = Int8 | Int4 | DynamicInt8
Joined = Int4 | DynamicInt8  # layers in these that read the same become one product
_Wanted = tuple[onnx.NodeProto, Joined]


def weight_of(layer: Layer, model: onnx.ModelProto, folder: Path) -> np.ndarray:
    """A layer's weight [K,N], mapped from its file."""
    tensor = next(item for item in model.graph.initializer if item.name == layer.weight)
    values = read(tensor, folder)
    return values.T if layer.transposed else values


def rewrite(
    model: onnx.ModelProto,
    changes: Sequence[Change],
    store: Store,
    file: str,
    apart: Set[Place] = frozenset(),
) -> None:
    """Change layers of a graph in place; every weight, changed or not, goes to the store.

    apart  places of weights that are not joined with others: see `read_apart`
    """
    data = f"{file}.data"
    writer = _Writer(model, store, data)
    wanted = {change.layer.node: change for change in changes}
    joined = {group[0].layer.node: group for group in _products(changes, apart)}
    nodes = {node.name: node for node in model.graph.node}
    for node in list(model.graph.node):
        change = wanted.get(node.name)
        if isinstance(change, Int8):
            writer.int8(node, change)
        elif change is None:
            writer.nodes.append(node)
        elif isinstance(change, Int4) and change.target != "ort":
            writer.int4(node, change)
        elif node.name in joined:
            writer.joined([(nodes[one.layer.node], one) for one in joined[node.name]])
    writer.finish()


def _products(changes: Iterable[Change], apart: Set[Place]) -> list[list[Joined]]:
    """The layers in int4 or dynamic int8 for ONNX Runtime, those together that become one product: they read
    the same.

    Query, key and value, gate and up: the input is then rounded once, and a narrow product (the keys of few
    heads) does not leave a thread idle. A column's sums do not change, so the results are the same.
    """
    groups: dict[tuple[str, ...], list[Joined]] = {}
    for change in changes:
        if isinstance(change, DynamicInt8) or (isinstance(change, Int4) and change.target == "ort"):
            layer = change.layer
            single = (layer.node,) if layer.place in apart else ()
            kind = type(change).__name__
            groups.setdefault((layer.source, layer.dtype, kind, *single), []).append(change)
    return list(groups.values())


def read_apart(plan: Iterable[Sequence[Change]]) -> set[Place]:
    """Weights that graphs read in different company: joined with others, they would be stored twice.

    plan  the changes of each graph
    """
    company: dict[Place, set[tuple[Place, ...]]] = {}
    for changes in plan:
        for group in _products(changes, frozenset()):
            places = tuple(one.layer.place for one in group)
            for place in places:
                company.setdefault(place, set()).add(places)
    return {place for place, found in company.items() if len(found) > 1}


class _Writer:
    """Builds the new node list and initializers of one graph."""

    def __init__(self, model: onnx.ModelProto, store: Store, data: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._model, self._store, self._data = model, store, data
        self._made: dict[str, onnx.TensorProto] = {}
        self._rounded: dict[str, str] = {}  # activation -> the same, rounded

    def int8(self, node: onnx.NodeProto, change: Int8) -> None:
        """QuantizeLinear and DequantizeLinear before both factors; the product stays in float."""
        layer = change.layer
        weight, name = weight_of(layer, self._model, self._store.source), f"{layer.stem}__int8"
        if name not in self._made:
            codes, scales = int8_channels(np.asarray(weight, np.float32))
            self._add(name, codes, TensorProto.INT8, list(layer.shape))
            self._float(f"{name}_scale", scales, layer.dtype)
            self._add(f"{name}_zero", np.zeros(layer.shape[1], np.int8), TensorProto.INT8, [layer.shape[1]])
            self._as_weight(f"{name}_float", layer)
            inputs = [name, f"{name}_scale", f"{name}_zero"]
            self.nodes.append(
                helper.make_node(
                    "DequantizeLinear", inputs, [f"{name}_float"], f"{name}_dq", domain=change.domain, axis=1
                )
            )
        self._product(node, self._round(change), f"{name}_float")

    def _as_source(self, name: str, source: str, width: int | None = None, kind: int | None = None) -> None:
        """Say that a new tensor has another's shape, or another `width` of its last dimension, or another
        type: memory and operations are told from shapes."""
        graph = self._model.graph
        for info in (*graph.value_info, *graph.input, *graph.output):
            if info.name == source:
                known = onnx.ValueInfoProto(name=name, type=info.type)
                if width is not None:
                    known.type.tensor_type.shape.dim[-1].dim_value = width
                if kind is not None:
                    known.type.tensor_type.elem_type = kind
                graph.value_info.append(known)
                return

    def _as_weight(self, name: str, layer: Layer) -> None:
        """Say that a new tensor has a weight's shape."""
        kind = TensorProto.FLOAT16 if layer.dtype == "float16" else TensorProto.FLOAT
        self._model.graph.value_info.append(helper.make_tensor_value_info(name, kind, layer.shape))

    def _round(self, change: Int8) -> str:
        source = change.layer.source
        if source not in self._rounded:
            name, unsigned = f"{source}__rounded", change.activations == "uint8"
            self._float(f"{name}_scale", np.array(change.range.scale(INT8)), change.layer.dtype)
            zero, kind = (128, TensorProto.UINT8) if unsigned else (0, TensorProto.INT8)
            self._add(f"{name}_zero", np.array(zero, np.uint8), kind, [])
            parts, codes, domain = [f"{name}_scale", f"{name}_zero"], f"{name}_codes", change.domain
            self.nodes += [
                helper.make_node("QuantizeLinear", [source, *parts], [codes], f"{name}_q", domain=domain),
                helper.make_node("DequantizeLinear", [codes, *parts], [name], f"{name}_dq", domain=domain),
            ]
            self._as_source(name, source)
            self._rounded[source] = name
        return self._rounded[source]

    def int4(self, node: onnx.NodeProto, change: Int4) -> None:
        """A DequantizeLinear by blocks before the product, for TensorRT."""
        layer = change.layer
        name = f"{layer.stem}__int4"
        if name not in self._made:
            blocks = self._blocks(change)
            self._add(name, blocks.packed_tensor(), TensorProto.INT4, list(layer.shape))
            self._float(f"{name}_scale", np.ascontiguousarray(blocks.scales.T), layer.dtype)
            self._as_weight(f"{name}_float", layer)
            inputs, made = [name, f"{name}_scale"], [f"{name}_float"]
            self.nodes.append(
                helper.make_node(
                    "DequantizeLinear", inputs, made, f"{name}_dq", axis=0, block_size=change.block
                )
            )
        self._product(node, layer.source, f"{name}_float")

    def joined(self, group: Sequence[_Wanted]) -> None:
        """One product for layers that read the same, for ONNX Runtime; a Split gives each its columns."""
        widths = [one.layer.shape[1] for _, one in group]
        results = [self._result(node) for node, _ in group]
        first = group[0][0]
        whole = results[0] if len(group) == 1 else f"{first.output[0]}__joined"
        int4 = [one for _, one in group if isinstance(one, Int4)]
        if int4:
            self._nbits(int4, whole, first.name)
        else:
            self._dynamic([one.layer for _, one in group], whole, first.name)
        if len(group) > 1:
            self._split(whole, widths, results)
        for (node, _), result in zip(group, results, strict=True):
            self._bias(node, result)

    def _nbits(self, group: Sequence[Int4], result: str, node: str) -> None:
        """A MatMulNBits [..., sum of N]."""
        layers = [one.layer for one in group]
        name = f"{'+'.join(layer.stem for layer in layers)}__int4"
        if name not in self._made:
            blocks = [self._blocks(one) for one in group]
            packed = np.concatenate([one.packed() for one in blocks])
            self._add(name, packed, TensorProto.UINT8, list(packed.shape))
            self._float(
                f"{name}_scale", np.concatenate([one.scales.reshape(-1) for one in blocks]), layers[0].dtype
            )
        product = helper.make_node(
            "MatMulNBits",
            [layers[0].source, name, f"{name}_scale"],
            [result],
            node,
            domain=_MICROSOFT,
            K=layers[0].shape[0],
            N=sum(layer.shape[1] for layer in layers),
            bits=4,
            block_size=group[0].block,
            accuracy_level=_COMPUTE_INT8,
        )
        self.nodes.append(product)

    def _dynamic(self, layers: Sequence[Layer], result: str, node: str) -> None:
        """A MatMulIntegerToFloat [..., sum of N] of codes, times each row's scale."""
        name = f"{'+'.join(layer.stem for layer in layers)}__int8"
        if name not in self._made:
            made = [int8_channels(np.asarray(self._weight(layer), np.float32)) for layer in layers]
            codes = np.concatenate([one for one, _ in made], axis=1)
            self._add(name, codes, TensorProto.INT8, list(codes.shape))
            self._float(f"{name}_scale", np.concatenate([scales for _, scales in made]), "float32")
        codes_name, scale = self._round_rows(layers[0].source)
        # Weights have no zero point, and it is said: where it is left out, ONNX Runtime before 1.30 ends the
        # process on x86 without VNNI. One for each product: later versions cannot rewrite a shared one.
        self._add(no_shift := f"{node}__zero", np.array(0, np.int8), TensorProto.INT8, [])
        inputs = [codes_name, name, _ONE, f"{name}_scale", _ZERO, no_shift]
        product, width = f"{result}__in_steps", sum(layer.shape[1] for layer in layers)
        self.nodes += [
            helper.make_node("MatMulIntegerToFloat", inputs, [product], node, domain=_MICROSOFT),
            helper.make_node("Mul", [product, scale], [result], f"{node}_scaled"),
        ]
        self._as_source(product, layers[0].source, width)

    def _round_rows(self, source: str) -> tuple[str, str]:
        """(codes uint8 [..., K] around 128, scale [..., 1]) of a tensor [..., K]: each row has its own."""
        codes, scale = f"{source}__codes", f"{source}__scale"
        if source not in self._rounded:
            self._float(_ONE, np.array(1), "float32")
            self._add(_ZERO, np.array(128, np.uint8), TensorProto.UINT8, [])
            self._float(_LEAST, np.array(_TINY), "float32")
            self._float(_STEP, np.array(1 / INT8), "float32")
            self._add(_LAST, np.array([-1], np.int64), TensorProto.INT64, [1])
            parts = {part: f"{source}__{part}" for part in ("top", "bottom", "below", "size", "steps")}
            make = helper.make_node
            self.nodes += [
                make("ReduceMax", [source, _LAST], [parts["top"]], parts["top"], keepdims=1),
                make("ReduceMin", [source, _LAST], [parts["bottom"]], parts["bottom"], keepdims=1),
                make("Neg", [parts["bottom"]], [parts["below"]], parts["below"]),
                make("Max", [parts["top"], parts["below"], _LEAST], [parts["size"]], parts["size"]),
                make("Mul", [parts["size"], _STEP], [scale], scale),
                make("Div", [source, scale], [parts["steps"]], parts["steps"]),
                make("QuantizeLinear", [parts["steps"], _ONE, _ZERO], [codes], codes, domain=_MICROSOFT),
            ]
            self._as_source(parts["steps"], source)
            self._as_source(codes, source, kind=TensorProto.UINT8)
            self._rounded[source] = codes
        return codes, scale

    def _split(self, whole: str, widths: Sequence[int], results: Sequence[str]) -> None:
        sizes = f"{whole}_sizes"
        self._add(sizes, np.array(widths, np.int64), TensorProto.INT64, [len(widths)])
        self.nodes.append(helper.make_node("Split", [whole, sizes], results, f"{whole}_split", axis=-1))
        self._as_source(whole, results[0], sum(widths))

    def _blocks(self, change: Int4) -> Blocks:
        return change.blocks(self._weight(change.layer))

    def _weight(self, layer: Layer) -> np.ndarray:
        return weight_of(layer, self._model, self._store.source)

    def _product(self, node: onnx.NodeProto, source: str, weight: str) -> None:
        result = self._result(node)
        self.nodes.append(helper.make_node("MatMul", [source, weight], [result], node.name))
        self._bias(node, result)

    def _result(self, node: onnx.NodeProto) -> str:
        """What the product is called: the node's own output, unless a bias is still to be added."""
        return f"{node.output[0]}__product" if len(node.input) > 2 and node.input[2] else node.output[0]

    def _bias(self, node: onnx.NodeProto, result: str) -> None:
        if result != node.output[0]:
            inputs = [result, node.input[2]]
            self.nodes.append(helper.make_node("Add", inputs, [node.output[0]], f"{node.name}_bias"))

    def _float(self, name: str, values: np.ndarray, dtype: str) -> None:
        kind = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.FLOAT
        self._add(name, values.astype(dtype), kind, list(values.shape))

    def _add(self, name: str, values: np.ndarray, kind: int, dims: list[int]) -> None:
        self._made[name] = self._store.tensor(name, values, kind, dims, self._data)

    def finish(self) -> None:
        """Put the new parts into the graph, without the weights that nothing reads any more."""
        graph = self._model.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        read_names = {name for node in graph.node for name in node.input} | {
            item.name for item in graph.output
        }
        kept = [item for item in graph.initializer if item.name in read_names]
        for item in kept:
            self._store.move(item, self._data)
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self._made.values()])
        known = {item.domain for item in self._model.opset_import}
        for domain in {node.domain for node in graph.node} - known:
            self._model.opset_import.append(helper.make_opsetid(domain, 1))
