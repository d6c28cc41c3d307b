"""Graphs that a bundle has apart, as the one graph that transformers.js runs."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.tape import Tape

from vtp.export.layouts.transformers_js.clients import Client
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import StageInfo

BATCH = "batch_size"  # transformers.js knows this axis by name
PICTURES = "num_images"
FLOAT = ir.DataType.FLOAT


def vision_encoder(bundle: Bundle, client: Client) -> ir.Model:
    """Encoder, pruner and projector: pixel_values -> image_features float32 [n,K,D], keep_indices [n,K].

    pixel_values are float32 [n,3,H,W]; of a client with `views` [B,P,3,H,W] beside pixel_attention_mask,
    which is not read, and n is B·P. D is one wider where the decoder wants to know the picture's end: see
    `mark_lookahead`. Without pruning there are no keep_indices.
    """
    stages = [stage for stage in bundle.manifest.stages if stage.when == "image"]
    model, given = _joined(bundle, stages)
    graph = model.graph
    features = given["kept_embeds" if "kept_embeds" in given else "image_embeds"]
    tape = Tape()
    features = as_float(tape, features)
    if has_lookahead(bundle):
        features = mark_lookahead(tape, features, bundle.manifest.visual.keep[0])
    graph.extend(tape.nodes)
    _take_floats(graph, client)
    keep = bundle.manifest.visual.keep[0]
    rows: list[int | str] = [f"{BATCH}*{PICTURES}" if client.views else BATCH, keep]
    width = bundle.manifest.model.hidden_size + has_lookahead(bundle)
    features.type, features.shape = ir.TensorType(FLOAT), ir.Shape([*rows, width])
    outputs = {"image_features": features}
    if "keep_indices" in given:
        outputs["keep_indices"] = given["keep_indices"]
        given["keep_indices"].shape = ir.Shape(rows)
    for name, value in outputs.items():
        value.name = name
        graph.outputs.append(value)
    return finished(model)


def embed_tokens(bundle: Bundle) -> ir.Model:
    """input_ids int64 [B,S] -> inputs_embeds float32 [B,S,D]; a zero more where `has_lookahead`."""
    stage = bundle.manifest.stages_of("embed")[0]
    model = ir.load(bundle.path(stage.file))
    graph = model.graph
    (embeds,) = graph.outputs
    graph.outputs.clear()
    tape = Tape()
    embeds.name = "embeds"
    result = as_float(tape, embeds)
    if has_lookahead(bundle):
        result = tape.op("Pad", [result, constant(tape, [0, 0, 0, 0, 0, 1])])
    if result is embeds:
        result = tape.op("Identity", [embeds])
    graph.extend(tape.nodes)
    result.name, result.type = "inputs_embeds", ir.TensorType(FLOAT)
    width = bundle.manifest.model.hidden_size + has_lookahead(bundle)
    result.shape = ir.Shape([BATCH, "sequence_length", width])
    graph.outputs.append(result)
    graph.inputs[0].shape = ir.Shape([BATCH, "sequence_length"])
    return finished(model)


def computes_in_float64(model: ir.Model) -> bool:
    """Whether a graph does what ONNX Runtime's build for browsers has no kernels for."""
    weights = any(value.dtype == ir.DataType.DOUBLE for value in model.graph.initializers.values())
    return weights or any(
        value.dtype == ir.DataType.DOUBLE for node in model.graph.all_nodes() for value in node.outputs
    )


def has_lookahead(bundle: Bundle) -> bool:
    """Whether a token's last column says how many of the tokens after it it sees, for its decoder.

    In Gemma 3 a picture's tokens see one another, and transformers.js tells the decoder nothing of pictures.
    """
    decoder = bundle.manifest.stages_of("decoder")[0]
    return "ahead" in bundle.manifest.graphs[decoder.file].inputs


def mark_lookahead(tape: Tape, features: ir.Value, keep: int) -> ir.Value:
    """features [n,K,D] -> [n,K,D+1]: the last column says how many of its picture follow, K - 1 to 0."""
    counts = [[[float(number)] for number in range(keep - 1, -1, -1)]]
    pictures = tape.op("Shape", [features], {"start": 0, "end": 1})
    shape = tape.op("Concat", [pictures, constant(tape, [keep, 1])], {"axis": 0})
    column = tape.op("Expand", [constant(tape, counts, FLOAT), shape])
    return tape.op("Concat", [features, column], {"axis": 2})


def as_float(tape: Tape, value: ir.Value) -> ir.Value:
    """A value in float32, which files of every dtype give and take, so that they can be mixed."""
    return value if value.dtype in (None, FLOAT) else tape.op("Cast", [value], {"to": FLOAT.value})


def constant(tape: Tape, values: object, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
    """A constant of the graph that a tape is for."""
    return tape.op("Constant", [], {"value": ir.tensor(values, dtype=dtype)})  # type: ignore[arg-type]


def axes(value: ir.Value) -> list[int | str]:
    """A value's axes, by length or by name."""
    return [axis if isinstance(axis, int) else str(axis) for axis in value.shape or ()]


def fixed_axes(value: ir.Value) -> list[int]:
    """The lengths of a value's axes that have no names."""
    return [axis for axis in axes(value) if isinstance(axis, int)]


def finished(model: ir.Model) -> ir.Model:
    """The model with every value named, nothing unused, and no inner shapes that no longer hold."""
    graph = model.graph
    kept = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    for node in graph:
        for value in node.outputs:
            value.shape = value.shape if value in kept else None
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.NameFixPass()(model)
    return model


def _joined(bundle: Bundle, stages: Iterable[StageInfo]) -> tuple[ir.Model, dict[str, ir.Value]]:
    """The graphs of the stages in one, and its values by the names that the pipeline has for them."""
    given: dict[str, ir.Value] = {}
    inputs: list[ir.Value] = []
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []
    opsets: dict[str, int] = {}
    version = 0
    for stage in stages:
        part = ir.load(bundle.path(stage.file))
        _rename(part.graph, stage.name)
        for name, value in zip(stage.inputs, list(part.graph.inputs), strict=True):
            source = given.get(stage.inputs[name])
            if source is None:
                inputs.append(value)
            else:
                value.replace_all_uses_with(source)
        for name, value in zip(stage.outputs, part.graph.outputs, strict=True):
            given[stage.outputs[name]] = value
        _take_apart(part.graph, nodes, weights)
        opsets.update(part.graph.opset_imports)
        version = max(version, part.ir_version)
    graph = ir.Graph(inputs, [], nodes=nodes, initializers=weights, opset_imports=opsets, name="main")
    return ir.Model(graph, ir_version=version), given


def _rename(graph: ir.Graph, prefix: str) -> None:
    """Give what is inside a graph names that no other stage's has."""
    for value in list(graph.initializers.values()):
        value.name = f"{prefix}.{value.name}"
    for node in graph:
        node.name = f"{prefix}/{node.name}"
        for value in node.outputs:
            value.name = f"{prefix}/{value.name}"


def _take_apart(graph: ir.Graph, nodes: list[ir.Node], weights: list[ir.Value]) -> None:
    """Move a graph's nodes and initializers into the lists, so that another graph may own them."""
    graph.inputs.clear()
    graph.outputs.clear()
    own = list(graph)
    graph.remove(own)
    nodes += own
    weights += graph.initializers.values()
    graph.initializers.clear()


def _take_floats(graph: ir.Graph, client: Client) -> None:
    """Make pixel_values float32 [n,3,H,W], or with views [B,P,3,H,W] beside a mask."""
    (pixels,) = graph.inputs
    size, dtype = fixed_axes(pixels), pixels.dtype
    leading = [BATCH, PICTURES] if client.views else [BATCH]
    pixels.name = "pixels"
    given = ir.Value(name="pixel_values", type=ir.TensorType(FLOAT), shape=ir.Shape([*leading, *size]))
    tape = Tape()
    value = given
    if client.views:
        value = tape.op("Reshape", [value, constant(tape, [-1, *size])])
    if dtype not in (None, FLOAT):
        value = tape.op("Cast", [value], {"to": dtype.value})
    graph.inputs.clear()
    pixels.replace_all_uses_with(value)
    graph.inputs.append(given)
    if client.views:
        mask = ir.Value(
            name="pixel_attention_mask",
            type=ir.TensorType(ir.DataType.BOOL),
            shape=ir.Shape([BATCH, PICTURES, *size[1:]]),
        )
        graph.inputs.append(mask)
    if tape.nodes:
        graph.insert_before(graph[0], tape.nodes)
