"""Initializers whose numbers stay in the checkpoint until they are written into a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from vtp.engines import VtpError
from vtp.export.checkpoint.weights import Source, source_of


class Streamed(ir.LazyTensor):
    """A checkpoint's tensor, or its transpose, read anew each time its numbers are asked for."""

    def __init__(self, source: Source, dtype: ir.DataType, transposed: bool = False) -> None:
        shape = source.shape[::-1] if transposed else source.shape
        super().__init__(self._read, dtype=dtype, shape=ir.Shape(shape), name=source.name)
        self.source = source
        self.transposed = transposed

    @property
    def origin(self) -> tuple[Any, ...]:
        """What makes two of them equal without a look at their numbers."""
        return self.source.file, self.source.name, str(self.dtype), self.transposed

    def pieces(self) -> Iterator[np.ndarray]:
        """The numbers in order, some MB at a time."""
        return (piece.numpy() for piece in self.source.pieces(self.transposed))

    def _read(self) -> ir.Tensor:
        whole = self.source.read()
        return ir.Tensor((whole.T.contiguous() if self.transposed else whole).numpy())


def stream(model: ir.Model) -> None:
    """Replace stand-ins among the initializers by what reads their numbers, in place.

    Linear layers are traced as a product with a transposed weight. The transposes become part of how a weight
    is read: constant folding would do the same, with all weights in memory.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        raw = getattr(tensor, "raw", None)
        source = source_of(raw) if isinstance(raw, torch.Tensor) else None
        if source is not None and tensor is not None:
            value.const_value = Streamed(source, tensor.dtype)
    for node in list(model.graph):
        if node.op_type == "Transpose" and node.domain == "":
            _absorb(model.graph, node)


def _absorb(graph: ir.Graph, node: ir.Node) -> None:
    """Drop a transpose whose only input is a streamed matrix that nothing else reads."""
    weight, result = node.inputs[0], node.outputs[0]
    tensor = None if weight is None else weight.const_value
    if weight is None or not isinstance(tensor, Streamed) or tensor.transposed or len(weight.uses()) > 1:
        return
    if len(tensor.shape) != 2 or list(node.attributes.get_ints("perm", [1, 0])) != [1, 0]:
        return
    if result.is_graph_output():
        return
    weight.const_value = Streamed(tensor.source, tensor.dtype, transposed=True)
    weight.shape = weight.const_value.shape
    result.replace_all_uses_with(weight)
    graph.remove(node, safe=True)


def refuse_made_up(model: ir.Model, name: str) -> None:
    """Raise VtpError for a constant that was computed from stand-ins while a graph was made: it is NaN."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, Streamed) or not tensor.dtype.is_floating_point():
            continue
        if np.isnan(tensor.numpy()).any():
            raise VtpError(
                f"graph {name} holds the constant {value.name}, computed from weights before they were "
                "loaded; the family must take them with `real` first"
            )
