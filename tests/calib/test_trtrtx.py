"""What vtp-calib quantize writes for TensorRT builds with TensorRT-RTX, and runs on ONNX Runtime as well."""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtp.calib.data import Sample
from vtp.calib.quantize.layers import load_graph
from vtp.calib.quantize.quantizer import Quantizer, Wish
from vtp.engines.tensorrt.library import INSTALL, Profile, build_engine
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import Bundle, open_bundle, whole_bundle
from vtp.runtime.bundle.manifest import GraphInfo

from ..conftest import MAX_LENGTH
from ..once import Once

ENGINE = "tensorrt-rtx"
MISSING = util.find_spec("tensorrt_rtx") is None
pytestmark = [
    pytest.mark.trtrtx,
    pytest.mark.skipif(MISSING, reason=f"tensorrt_rtx is not installed: {INSTALL[ENGINE]}"),
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({}, id="float16"),
        pytest.param({"dtype": "float32"}, id="float32", marks=pytest.mark.slow),
    ],
)
def made(
    request: Any,
    once: Once,
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Callable[[str], Path],
    picture_file: Path,
) -> Bundle:
    """A bundle for TensorRT with int8 and int4 layers; its decoder is in two parts."""
    root = tmp_path_factory.mktemp("trt")
    wishes = {"method": "adaptprune", "target": "tensorrt", "max_length": MAX_LENGTH, "verify": "full"}
    wishes |= {"keep_tokens": "5", **request.param}  # in float16 the bundle of tests/export/test_target.py
    source = open_bundle(once.bundle(model_folder("gqa"), **wishes))
    quantizer = Quantizer(source, Wish("int8", "int4"))
    with whole_bundle(root / "small") as aside:
        sample = Sample(picture_file, "what ?")
        quantizer.observe(aside / "probe", [sample], "ort-cpu", 1, lambda _: None)
        quantizer.write(aside, set())
    assert not any(one.left for one in quantizer.judged)
    return open_bundle(root / "small", check_hashes=True)


def profile(graph: GraphInfo) -> Profile:
    """Least, usual and largest shape of every input, at batch 1."""

    def shape(axes: list[int | str], place: int) -> list[int]:
        sizes = {"batch": 1, **{name: sizes[place] for name, sizes in graph.axes.items() if name != "batch"}}
        return [axis if isinstance(axis, int) else sizes[axis] for axis in axes]

    return {
        name: (shape(info.shape, 0), shape(info.shape, 1), shape(info.shape, 2))
        for name, info in graph.inputs.items()
    }


def test_every_quantised_graph_builds(made: Bundle) -> None:
    built = 0
    for file, graph in made.manifest.graphs.items():
        operators = {node.op_type for node in load_graph(made.path(file)).graph.node}
        assert "MatMulNBits" not in operators
        if "DequantizeLinear" in operators:
            assert build_engine(made.path(file), ENGINE, profile(graph)).plan.nbytes, file
            built += 1
    assert built == 4  # vision encoder, projector and both parts of the decoder


def test_no_unsigned_codes_are_written(made: Bundle) -> None:
    for file in made.manifest.graphs:
        zeros = [
            item for item in load_graph(made.path(file)).graph.initializer if "__rounded_zero" in item.name
        ]
        assert all(item.data_type == 3 for item in zeros)  # int8


def test_the_same_bundle_answers_on_onnx_runtime(made: Bundle, picture: Image.Image) -> None:
    with Pipeline.load(made.folder, "ort-cpu", threads=1) as pipe:
        assert len(pipe.generate(picture, "what ?", max_new_tokens=3).token_ids) == 3
