"""The decoder on a cache that grows: transformers.js hands in the whole past and takes the whole present."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.tape import Tape

from vtp.engines import UsageError
from vtp.engines.graph.file import read_graph
from vtp.engines.graph.masks import masks_attention
from vtp.export.layouts.transformers_js.clients import Client
from vtp.export.layouts.transformers_js.joining import (
    BATCH,
    FLOAT,
    axes,
    constant,
    finished,
    fixed_axes,
    has_lookahead,
)
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import GraphInfo

SEQUENCE, PAST, TOTAL = "sequence_length", "past_sequence_length", "total_sequence_length"
_PADDED = "attention_mask holds padding; give one prompt at a time, or prompts of equal length"


def decoder_model_merged(bundle: Bundle, client: Client) -> ir.Model:
    """A decoder with the inputs that transformers.js knows.

    inputs_embeds float32 [B,S,D] (one wider where `has_lookahead`), attention_mask int64 [B,P+S], past keys
    and values [B,G,P,d] -> logits float32 [B,1,V], present keys and values [B,G,P+S,d]. What the bundle's
    decoder wants beside these is derived from the mask: lengths, positions. A mask with a 0 ends the run with
    an error whose node's name says why: the bundle's decoder is told of padding on the right alone, and the
    client's is on the left.
    """
    stage = bundle.manifest.stages_of("decoder")[0]
    if masks_attention(read_graph(bundle.path(stage.file))):
        raise UsageError(
            "the ONNX Runtimes of layout transformers.js know no attention that takes masks; export without "
            "--oldest-onnxruntime"
        )
    info = bundle.manifest.graphs[stage.file]
    model = ir.load(bundle.path(stage.file))
    graph = model.graph
    inputs = {value.name or "": value for value in graph.inputs}
    front = _Front(client.first_position)
    given = front.derive(inputs, has_lookahead(bundle))
    names = [name for name in inputs if name.startswith("past_key_values.")]
    fixed = all(node.op_type != "GroupQueryAttention" for node in graph)  # else it appends by itself
    for name in names:
        given[name] = front.past(inputs[name], fixed)
    graph.inputs.clear()
    for name, value in given.items():
        inputs[name].replace_all_uses_with(value)
    graph.inputs.extend(front.inputs)
    graph.insert_before(graph[0], front.tape.nodes)
    _name_axes(graph, info)
    return finished(model)


class _Front:
    """What is put in front of a bundle's decoder."""

    def __init__(self, first_position: int) -> None:
        self.first_position = first_position
        self.tape = Tape()
        self.inputs: list[ir.Value] = []

    def derive(self, inputs: dict[str, ir.Value], lookahead: bool) -> dict[str, ir.Value]:
        """By name, what the decoder takes beside the cache."""
        op, embeds = self.tape.op, inputs["inputs_embeds"]
        width = fixed_axes(embeds)[-1]
        rows = self._input("inputs_embeds", FLOAT, [BATCH, SEQUENCE, width + lookahead])
        mask = self._input("attention_mask", ir.DataType.INT64, [BATCH, TOTAL])
        self.new = op("Shape", [rows], {"start": 1, "end": 2})
        total = op("Add", [op("Shape", [mask], {"start": 1, "end": 2}), self._without_padding(mask)])
        last = op("Sub", [op("ReduceSum", [mask, constant(self.tape, [1])], {"keepdims": 0}), self._one])
        given: dict[str, ir.Value] = {}
        if lookahead:
            sizes = constant(self.tape, [width, 1])
            rows, ahead = self.tape.op_multi_out("Split", [rows, sizes], {"axis": 2}, num_outputs=2)
            whole = op("Cast", [ahead], {"to": ir.DataType.INT64.value})
            given["ahead"] = op("Squeeze", [whole, constant(self.tape, [2])])
        given["inputs_embeds"] = self._in(embeds, rows)
        given["position_ids"] = self._positions(mask)
        given["seqlens_k"] = op("Cast", [last], {"to": ir.DataType.INT32.value})
        short = op("Cast", [total], {"to": ir.DataType.INT32.value})
        given["total_sequence_length"] = op("Squeeze", [short])
        return given

    def past(self, cache: ir.Value, fixed: bool) -> ir.Value:
        """What the decoder takes for the cache that comes in: if `fixed`, with room for what it writes."""
        _, groups, _, width = axes(cache)
        given = self._input(cache.name or "", cache.dtype or FLOAT, [BATCH, groups, PAST, width])
        if not fixed:
            return given
        op = self.tape.op
        rows = op("Shape", [given], {"start": 0, "end": 2})
        end = op("Shape", [given], {"start": 3, "end": 4})
        shape = op("Concat", [rows, self.new, end], {"axis": 0})
        room = op("Expand", [constant(self.tape, [[[[0.0]]]], cache.dtype or FLOAT), shape])
        return op("Concat", [given, room], {"axis": 2})

    def _input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    @property
    def _one(self) -> ir.Value:
        return constant(self.tape, 1)

    def _in(self, like: ir.Value, value: ir.Value) -> ir.Value:
        """A float32 value in the dtype that the decoder computes in."""
        if like.dtype in (None, FLOAT):
            return value
        return self.tape.op("Cast", [value], {"to": like.dtype.value})

    def _positions(self, mask: ir.Value) -> ir.Value:
        """int64 [B,S]: the numbers of the last S places, from `first_position` on."""
        op = self.tape.op
        counted = op("CumSum", [mask, constant(self.tape, 1)])
        numbers = op("Add", [counted, constant(self.tape, self.first_position - 1)])
        ends = constant(self.tape, [2**31 - 1])
        return op("Slice", [numbers, op("Neg", [self.new]), ends, constant(self.tape, [1])])

    def _without_padding(self, mask: ir.Value) -> ir.Value:
        """int64 [1]: 0; a run with padding ends here."""
        least = self.tape.op("ReduceMin", [mask], {"keepdims": 0})
        place = self.tape.op("Sub", [constant(self.tape, [1]), least])
        return self.tape.op("Gather", [constant(self.tape, [0]), place], {"axis": 0}, name=_PADDED)


def _name_axes(graph: ir.Graph, info: GraphInfo) -> None:
    """Say the outputs' shapes in the names of the new inputs."""
    names = {"batch": BATCH, "capacity": TOTAL, "sequence": SEQUENCE}
    for value in graph.outputs:
        shape = info.outputs[value.name or ""].shape
        value.shape = ir.Shape([names.get(axis, axis) if isinstance(axis, str) else axis for axis in shape])
