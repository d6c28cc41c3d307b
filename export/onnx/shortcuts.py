"""What `torch.onnx.export` does anew for every graph although the result is known: half of an export's time.

It fills the table of translations with some 600 functions, reads the signature of an ONNX operator from its
schema at every use, and traces the exported program a second time to
decompose operators and a third time to convert operands of different types. The table is the same each time,
and the graphs of this package are nearly free of operators that want decomposing: the few there are can be
replaced where they stand. A program with anything else in it (an operator that mutates, one that has no
translation, a sub-graph) is traced again as ever. For the conversions every operand's type is noted in the
program already. And while it traces, torch keeps what each operator gives for each shape, which costs more
than it saves where shapes are symbols.

These places are torch's own and not public. Where a version of torch lacks them, the exporter does all its
work.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from vtp.export.patched import patched

_EXPORTER = "torch.onnx._internal.exporter"
_aten = torch.ops.aten
_CONVERSIONS = (_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout)
_SAME = {
    _aten.__and__.Tensor: _aten.bitwise_and.Tensor,
    _aten.__or__.Tensor: _aten.bitwise_or.Tensor,
}
_ASSERTIONS = (
    _aten.sym_constrain_range_for_size.default,
    _aten._assert_async.default,
    _aten._assert_async.msg,
    _aten._assert_scalar.default,
    _aten._assert_tensor_metadata.default,
)


@contextmanager
def shortcuts() -> Iterator[None]:
    """Let `torch.onnx.export` take the table that it made before, and trace again only where it must."""
    with ExitStack() as stack:
        try:
            stack.enter_context(torch._dynamo.config.patch("fake_tensor_cache_enabled", False))
            promotion = import_module("torch.onnx._internal.fx.passes.type_promotion")
            interpreter = promotion._TypePromotionInterpreter
            run_node = _by_known_values(interpreter.run_node, promotion.get_type_promotion_rule)
            stack.enter_context(patched(interpreter, "run_node", run_node))
            registry = import_module(f"{_EXPORTER}._registration").ONNXRegistry
            passes = import_module(f"{_EXPORTER}._fx_passes")
            stack.enter_context(
                patched(registry, "from_torchlib", staticmethod(_remembered(registry.from_torchlib)))
            )
            signature = import_module("onnx_ir.schemas").OpSignature
            read = staticmethod(_read_once(signature.from_op_schema))
            stack.enter_context(patched(signature, "from_op_schema", read))
            decompose = _unless_settled(passes.decompose_with_registry)
            stack.enter_context(patched(passes, "decompose_with_registry", decompose))
        except (ImportError, AttributeError, KeyError):  # another torch: slower, not different
            stack.close()
        yield


@cache
def _table(build: Callable[..., Any], opset: int) -> Any:
    return build(opset_version=opset)


def _remembered(build: Callable[..., Any]) -> Callable[..., Any]:
    """`build`, which is asked once for each opset; every caller gets a table of its own to add to."""

    def from_torchlib(opset_version: int) -> Any:
        made = copy.copy(_table(build, opset_version))
        made.functions = {name: list(some) for name, some in made.functions.items()}
        return made

    return from_torchlib


@cache
def _read_once(read: Callable[..., Any]) -> Callable[..., Any]:
    """`read`, which is asked once for each operator and version of it."""
    made: dict[tuple[str, str, int], Any] = {}

    def from_op_schema(op_schema: Any) -> Any:
        key = op_schema.domain, op_schema.name, op_schema.since_version
        if key not in made:
            made[key] = read(op_schema)
        return made[key]

    return from_op_schema


def _by_known_values(
    run_node: Callable[[Any, Node], Any], rule_of: Callable[..., Any]
) -> Callable[[Any, Node], Any]:
    """`run_node`, but for operators whose value the program has: their operands are converted, no more."""

    def known(self: Any, node: Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return run_node(self, node)
        with self._set_current_node(node):
            if rule := rule_of(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    return known


def _unless_settled(decompose: Callable[..., Any]) -> Callable[..., Any]:
    def decompose_with_registry(exported_program: Any, registry: Any) -> Any:
        if settle(exported_program, registry.functions):
            return exported_program
        return decompose(exported_program, registry)

    return decompose_with_registry


def settle(program: Any, translations: Any) -> bool:
    """Replace in place what has no translation but a plain equal; whether nothing else is left.

    program       a `torch.export.ExportedProgram`
    translations  what has a translation: names of operators ("aten::add.Tensor") and Python functions
    """
    graph, signature = program.graph_module.graph, program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate or any(map(_mutates, graph.nodes)):
        return False  # and nothing is replaced: what is a copy and what is not makes a difference there
    sizes: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            _replace(graph, node, sizes)
        if isinstance(value := node.meta.get("val"), torch.SymInt):
            sizes.setdefault(value.node.expr, node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return all(_is_final(node, translations) for node in graph.nodes)


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _replace(graph: Graph, node: Node, sizes: Mapping[Any, Node]) -> None:
    """Replace one node, where that is wanted; `sizes` are the numbers computed before it."""
    if node.target in _ASSERTIONS:
        graph.erase_node(node)
    elif node.target in _SAME:
        node.target = _SAME[node.target]
    elif node.target in _CONVERSIONS:
        _convert(graph, node)
    elif node.target is _aten.rsub.Scalar and len(node.args) == 2:
        node.target, node.args = _aten.sub.Tensor, node.args[::-1]
    elif node.target is _aten.flatten.using_ints:
        _flatten(node, sizes)
    elif node.target is _aten.conv2d.padding:
        _pad_by_numbers(node)
    elif node.target is _aten.chunk.default:
        source, count, axis = _arguments(node, 0)
        node.args = (source, count, axis % source.meta["val"].ndim)
    if node.target is _aten.reshape.default:
        _view(graph, node)


def _convert(graph: Graph, node: Node) -> None:
    """A conversion: nothing where the dtype stays, else the operator that has a translation.

    An output of the program stays where it is, since the program's signature has it by its name.
    """
    source = _arguments(node)[0]
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype != dtype or any(user.op == "output" for user in node.users):
        node.target, node.args, node.kwargs = _aten._to_copy.default, (source,), {"dtype": dtype}
    else:
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _flatten(node: Node, sizes: Mapping[Any, Node]) -> None:
    """flatten(tensor, first, last) as a reshape, where the sizes that stay are known."""
    source, first, last = _arguments(node, 0, -1)
    shape, new = source.meta["val"].shape, node.meta["val"].shape
    end = range(len(shape))[last] + 1
    middle = new[first] if isinstance(new[first], int) else -1
    wanted = [_known(size, sizes) for size in (*shape[:first], middle, *shape[end:])]
    if None not in wanted:
        node.target, node.args = _aten.reshape.default, (source, wanted)


def _known(size: int | torch.SymInt, sizes: Mapping[Any, Node]) -> int | Node | None:
    return size if isinstance(size, int) else sizes.get(size.node.expr)


def _view(graph: Graph, node: Node) -> None:
    """A reshape as the view that it is, or of a copy where the values do not lie in that order.

    The translation of a view is the stricter one: a size of 0 means none, not "as before".
    """
    source, wanted = _arguments(node)
    value = source.meta["val"]
    try:
        value.view([size.meta["val"] if isinstance(size, Node) else size for size in wanted])
    except (RuntimeError, ValueError):
        kept: dict[str, Any] = {"memory_format": torch.contiguous_format}
        with graph.inserting_before(node):
            source = graph.call_function(_aten.clone.default, (source,), kept)
        source.meta["val"] = value.clone(**kept)
        new = node.meta["val"].shape
        wanted = [known if isinstance(known, int) else size for known, size in zip(new, wanted, strict=True)]
    node.target, node.args = _aten.view.default, (source, wanted)


def _arguments(node: Node, *defaults: Any) -> list[Any]:
    """A node's arguments; those that were left out from `defaults`, which the operator's schema ends with."""
    wanted = len(cast("Any", node.target)._schema.arguments)
    return [*node.args, *defaults[len(defaults) + len(node.args) - wanted :]] if defaults else [*node.args]


def _pad_by_numbers(node: Node) -> None:
    """conv2d(image, weight, bias, stride, "valid", dilation, groups): no padding, said in numbers."""
    given = _arguments(node, None, [1, 1], "valid", [1, 1], 1)
    if given[4] == "valid" and not node.kwargs:
        node.target, node.args = _aten.conv2d.default, (*given[:4], [0, 0], *given[5:])


def _is_final(node: Node, translations: Any) -> bool:
    """Whether the translator takes this node as it is."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.name() in translations or target.namespace in ("onnx", "onnx_symbolic")
    return getattr(target, "__module__", "") in (operator.__name__, "_operator", "math")
