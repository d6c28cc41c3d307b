"""Rewrites GroupQueryAttention for OpenVINO, so that a step neither reads nor writes the whole cache.

OpenVINO's own translation gives every new cache as a tensor of its own, and takes one length for all rows of
a batch. Here the graph reads of a cache [B,H,capacity,D] the part that is filled, and gives only the keys and
values that are new, [B,H,S,D]; its caller writes them where they belong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vtp.engines.errors import VtpError
from vtp.engines.openvino.library import load_openvino

OPERATOR = "GroupQueryAttention"
# The filled part is read in pieces of this many tokens: products of a new size are compiled anew, and this
# way every 64th step has one.
_PIECE = 64
# Beside query, key, value, past key, past value, seqlens_k and total_sequence_length nothing is understood.
_INPUTS = 7
_PLAIN: dict[str, Any] = {
    "causal": True,
    "do_rotary": False,
    "kv_cache_bit_width": 0,
    "local_window_size": -1,
    "sliding_window_cache": False,
    "smooth_softmax": False,
    "k_quant_type": "NONE",
    "v_quant_type": "NONE",
}


@dataclass
class Caches:
    """What the rewritten attention expects of its caller.

    pairs  present output -> past input, by their names: the output holds the new tokens only
    first  index of an output more, int32 [B]: the place in every row where its new tokens belong; None
           without attention
    """

    pairs: dict[str, str] = field(default_factory=dict)
    first: int | None = None


@dataclass(frozen=True)
class _Lengths:
    """What all nodes of a graph share: S new tokens of every row, after at most L that are there."""

    first: Any  # int32 [B]
    filled: Any  # int32 [1]: L, rounded up
    mask: Any  # [B,1,G*S,L+S], added to the scores
    rows: Any  # int32 [1]: G*S
    new: Any  # int32 [1]: S


def rewrite_attention(model: Any) -> Caches:
    """Rewrite every node of `model` in place. VtpError for one that does what is not known here."""
    found, known = Caches(), dict[tuple[Any, ...], _Lengths]()
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == OPERATOR]
    for node in nodes:
        _refuse_unknown(node)
        lengths = _lengths_of(node, known)
        output = _attend(node, lengths)
        for place, name in ((1, "key"), (2, "value")):
            _pair(node, place, name, found)
        node.output(0).replace(output.output(0))
        node.output(1).replace(node.input_value(1))
        node.output(2).replace(node.input_value(2))
    if len(known) > 1:
        raise VtpError("its attention nodes count the tokens of a row differently")
    for lengths in known.values():
        found.first = len(model.outputs)
        model.add_outputs([lengths.first.output(0)])
    if nodes:
        model.validate_nodes_and_infer_types()
    return found


def _refuse_unknown(node: Any) -> None:
    attributes: Mapping[str, Any] = node.get_attributes()
    for name, plain in _PLAIN.items():
        if attributes.get(name, plain) != plain:
            raise VtpError(f"its attention has {name} {attributes[name]}, which is not written for OpenVINO")
    for place in range(_INPUTS, node.get_input_size()):
        if not _is_absent(node.input_value(place)):
            raise VtpError(f"its attention has an input {place}, which is not written for OpenVINO")


def _is_absent(value: Any) -> bool:
    """Whether an optional input was left out: a constant without values stands for it."""
    shape = value.get_partial_shape()
    return shape.is_static and 0 in shape.to_shape() and value.get_node().get_type_name() == "Constant"


def _pair(node: Any, place: int, what: str, found: Caches) -> None:
    """Note which output takes the new tokens of which cache."""
    past = node.input_value(2 + place).get_node()
    readers = [target.get_node() for target in node.output(place).get_target_inputs()]
    if past.get_type_name() != "Parameter" or any(one.get_type_name() != "Result" for one in readers):
        raise VtpError(
            f"its attention keeps a {what} cache inside the graph, which is not written for OpenVINO"
        )
    for result in readers:
        found.pairs[result.get_output_tensor(0).get_any_name()] = past.get_output_tensor(0).get_any_name()


def _lengths_of(node: Any, known: dict[tuple[Any, ...], _Lengths]) -> _Lengths:
    counted = [node.input_value(place) for place in (5, 6)]
    attributes = node.get_attributes()
    groups = attributes["num_heads"] // attributes["kv_num_heads"]
    key = (*((one.get_node().get_friendly_name(), one.get_index()) for one in counted), groups)
    if key not in known:
        known[key] = _make_lengths(node, counted[0], counted[1], groups)
    return known[key]


def _make_lengths(node: Any, seqlens: Any, total: Any, groups: int) -> _Lengths:
    """Row b has seqlens[b] + 1 tokens with the new ones, or fewer than S new ones if it begins here."""
    op = load_openvino().opset13
    kind = node.input_value(0).get_element_type()
    new = _axis(node.input_value(1), 2)
    capacity = _axis(node.input_value(3), 2)
    before = op.maximum(op.subtract(op.reshape(total, _int([1]), False), new), _int([0]))
    pieces = op.divide(op.add(before, _int([_PIECE - 1])), _int([_PIECE]))
    filled = op.minimum(op.multiply(pieces, _int([_PIECE])), capacity)
    first = op.maximum(op.subtract(op.add(op.convert(seqlens, "i32"), _int(1)), new), _int([0]))
    together = op.add(filled, new)

    # A token sees what its row held before, and of the new ones those up to itself.
    key = op.unsqueeze(_count(together), _int([0, 1, 2]))
    query = op.unsqueeze(_count(new), _int([0, 1, 3]))
    old = op.less(key, op.unsqueeze(first, _int([1, 2, 3])))
    fresh = op.logical_and(op.greater_equal(key, filled), op.less_equal(op.subtract(key, filled), query))
    lowest = float(np.finfo(np.float16 if kind.get_type_name() == "f16" else np.float32).min)
    seen = op.select(op.logical_or(old, fresh), _of(kind, 0.0), _of(kind, lowest))
    rows = op.multiply(new, _int([groups]))
    tiled = op.tile(op.unsqueeze(seen, _int(2)), _int([1, 1, groups, 1, 1]))
    mask = op.reshape(tiled, op.concat([_int([0, 1]), rows, together], 0), True)
    return _Lengths(first, filled, mask, rows, new)


def _attend(node: Any, lengths: _Lengths) -> Any:
    """Attention of queries [B,heads,S,D] over the cache's filled part and the new tokens: [B,S,heads*D]."""
    op = load_openvino().opset13
    query, key, value, past_key, past_value = (node.input_value(place) for place in range(5))
    attributes = node.get_attributes()
    heads, groups_of = attributes["num_heads"], attributes["kv_num_heads"]
    width = query.get_partial_shape()[3].get_length()

    def whole(past: Any, fresh: Any) -> Any:
        filled = op.slice(past, _int([0]), lengths.filled, _int([1]), _int([2]))
        return op.concat([filled, fresh], 2)

    # Queries that share a key's head are rows of one product: nothing is repeated.
    grouped = op.reshape(query, op.concat([_int([0, groups_of]), lengths.rows, _int([width])], 0), True)
    found = op.scaled_dot_product_attention(
        grouped,
        whole(past_key, key),
        whole(past_value, value),
        lengths.mask,
        _of(query.get_element_type(), attributes["scale"] or width**-0.5),
    )
    by_head = op.reshape(found, op.concat([_int([0, heads]), lengths.new, _int([width])], 0), True)
    return op.reshape(op.transpose(by_head, _int([0, 2, 1, 3])), _int([0, 0, heads * width]), True)


def _axis(value: Any, axis: int) -> Any:
    op = load_openvino().opset13
    return op.gather(op.shape_of(value, "i32"), _int([axis]), _int(0))


def _count(length: Any) -> Any:
    """0 .. length - 1, of a length int32 [1]."""
    op = load_openvino().opset13
    return op.range(_int(0), op.squeeze(length, _int([0])), _int(1), "i32")


def _int(numbers: Any) -> Any:
    return load_openvino().opset13.constant(np.array(numbers, np.int32))


def _of(kind: Any, number: float) -> Any:
    return load_openvino().opset13.constant(number, kind)
