"""Bundles open on ONNX Runtime 1.23 to 1.25, which fuse Transpose into MatMul without a float64 kernel.

`make test-oldest` opens every method's bundle with a real 1.23.2; here the graphs are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vtp.export.onnx.emit import GraphInput, GraphSpec, WeightStore, emit
from vtp.export.pruners import find_method

from ...oracles.fusing import fused_in_float64


class Products(nn.Module):
    """As an outside method may write them: cast before and after the turn, on either side."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        exact = rows.double()
        late = rows.transpose(1, 2).double()
        return exact @ exact.transpose(1, 2), late @ exact, rows @ rows.transpose(1, 2)


def emitted(module: nn.Module, examples: dict[str, Tensor], outputs: list[str], folder: Path) -> Path:
    inputs = [GraphInput(name, tensor, {0: "batch"}) for name, tensor in examples.items()]
    return emit(GraphSpec("graph", module, inputs, outputs, rewrite=False), WeightStore(folder))


def test_no_float64_product_reads_a_transpose(tmp_path: Path) -> None:
    rows = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    path = emitted(Products(), {"rows": rows}, ["one", "two", "three"], tmp_path)
    assert fused_in_float64(path) == []
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 2):
        given = rows[:count]
        found = session.run(None, {"rows": given.numpy()})
        for one, two in zip(found, Products()(given), strict=True):
            assert one.dtype == two.numpy().dtype
            np.testing.assert_allclose(one, two.numpy(), rtol=1e-6, atol=1e-6)
    graph = onnx.load(path).graph  # in float32 the fusion is welcome
    last = next(node for node in graph.node if "three" in node.output)
    maker = {name: node.op_type for node in graph.node for name in node.output}
    assert [maker.get(name) for name in last.input] == [None, "Transpose"]


def test_the_pattern_is_found_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtp.export.onnx.emit.keep_transposes", lambda model: None)
    path = emitted(Products(), {"rows": torch.ones(2, 5, 4)}, ["one", "two", "three"], tmp_path)
    assert len(fused_in_float64(path)) == 2


class Named(nn.Module):
    """A pruner with its cues in order, as a graph takes them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.pruner: Any = find_method(name)((16, 17), 9)

    def forward(self, *cues: Tensor) -> Tensor:
        return self.pruner(**dict(zip(self.pruner.needs, cues, strict=True)))


@pytest.mark.parametrize("name", ["vispruner", "cdpruner", "otprune"])
def test_products_in_parts_stay_apart_too(name: str, tmp_path: Path) -> None:
    """272 tokens: the rows are multiplied in two parts, as those of a full-size model are."""
    module, generator = Named(name), torch.Generator().manual_seed(1)
    shapes = {"attention_scores": (2, 272), "text_mask": (2, 3), "text_embeds": (2, 3, 8)}
    cues = {cue: torch.rand(shapes.get(cue, (2, 272, 8)), generator=generator) for cue in module.pruner.needs}
    path = emitted(module, cues, ["keep_indices"], tmp_path)
    assert fused_in_float64(path) == []
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {cue: tensor.numpy() for cue, tensor in cues.items()})
    assert found.tolist() == module(*cues.values()).tolist()
