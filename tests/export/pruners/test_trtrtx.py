"""Every pruner and splice graph parses and builds with TensorRT-RTX, strongly typed; no GPU is needed.

Graphs come out of the exporter's own plan for a tiny model, so that a new method is tested by being there.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import onnx
import pytest

from vtp.engines.tensorrt.library import INSTALL, build_engine, refused_nodes
from vtp.export import exporter, pruners
from vtp.export.onnx.emit import GraphSpec, WeightStore, emit
from vtp.export.targets import TARGETS

from ...models.tiny import save_tiny
from .compared import Case, export

ENGINE, TARGET = "tensorrt-rtx", TARGETS["tensorrt"]
MISSING = util.find_spec("tensorrt_rtx") is None
pytestmark = [
    pytest.mark.trtrtx,
    pytest.mark.skipif(MISSING, reason=f"tensorrt_rtx is not installed: {INSTALL[ENGINE]}"),
]

METHODS = pruners.picture_methods()
COUNT, KEEP, LONGEST = 16, 6, 128  # visual tokens of the tiny model, how many stay, positions
# Least, usual and most of a named axis; names that are not here get the last row.
RANGES = {
    "batch": (1, 1, 2),
    "sequence": (COUNT + 1, 32, LONGEST),
    "text": (2, 12, LONGEST - COUNT),
    "visual": (1, KEEP, COUNT),
    "": (1, 8, 64),
}


class Planned(Exception):
    """Leaves the exporter as soon as it has laid out a bundle."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight decoder layers: enough for methods that act at several depths."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny(folder, layers=8, vision_layers=2)
    return folder


@pytest.fixture
def graphs_of(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[GraphSpec]]:
    """The graphs that vtp-export --target tensorrt lays out for a method, none of them traced yet."""
    plans: list[Any] = []

    def spy(model: Any, plan: Any, *_: Any) -> None:
        plans.append(plan)
        raise Planned

    def get(method: str, dtype: str) -> list[GraphSpec]:
        keep = None if method == "none" else str(KEEP)
        wish = exporter.Request(
            tmp_path / "bundle",
            str(tiny),
            method,
            keep,
            target=TARGET.name,
            dtype=dtype,
            max_length=LONGEST,
            verify="none",
        )
        monkeypatch.setattr(exporter, "_emit_graphs", spy)
        with pytest.raises(Planned):
            exporter.export(wish)
        return plans.pop().graphs

    return get


def ranges_of(path: Path) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Least, usual and largest shape of every input of a graph."""
    shapes = {}
    for item in onnx.load(path, load_external_data=False).graph.input:
        axes = item.type.tensor_type.shape.dim
        sizes = [
            RANGES.get(axis.dim_param, RANGES[""]) if axis.dim_param else [axis.dim_value] * 3
            for axis in axes
        ]
        shapes[item.name] = tuple(tuple(size[place] for size in sizes) for place in range(3))
    return shapes


def doubles(path: Path) -> list[str]:
    """Names of what a graph turns into, or holds as, float64."""
    graph = onnx.load(path, load_external_data=False).graph
    casts = [node for node in graph.node if node.op_type == "Cast"]
    made = [node.name for node in casts if node.attribute[0].i == onnx.TensorProto.DOUBLE]
    return made + [item.name for item in graph.initializer if item.data_type == onnx.TensorProto.DOUBLE]


def build(path: Path) -> int:
    return build_engine(path, ENGINE, ranges_of(path)).plan.nbytes


@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_pruner_and_splice_graphs_build(
    graphs_of: Callable[..., list[GraphSpec]], tmp_path: Path, method: str, dtype: str
) -> None:
    specs = [spec for spec in graphs_of(method, dtype) if spec.name.startswith(("pruner", "splice"))]
    names = {spec.name.partition("_")[0] for spec in specs}
    assert names == ({"splice"} if method == "none" else {"splice", "pruner"})
    for spec in specs:
        path = emit(spec, WeightStore(tmp_path), TARGET.opset)
        assert not doubles(path), "TensorRT would compute these in float32, in silence"
        assert refused_nodes(path, ENGINE) == []
        assert build(path), spec.name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[1:])
def test_selection_builds_at_full_size(tmp_path: Path, method: str) -> None:
    """64 of 576 tokens: the unrolled methods have some hundred nodes."""
    case = Case((24, 24), 64, dtype="float16")
    module = pruners.find_method(method)(case.grid, case.keep).eval()
    for part in module.modules():  # TensorRT makes float32 of float64 without a word
        if hasattr(part, "exact"):
            part.exact = False
    export(module, case, tmp_path / "pruner.onnx")
    assert build(tmp_path / "pruner.onnx")
