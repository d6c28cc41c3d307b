"""Targets tensorrt and jetpack6: standard operators on a fixed cache, equal to target ort, and taken by
TensorRT-RTX; what jetpack6 writes is in TensorRT 10.3's published list."""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from vtp.engines.graph.file import read_graph
from vtp.engines.ort.session import OrtEngine
from vtp.engines.tensorrt.library import INSTALL, build_engine, refused_nodes
from vtp.export.exporter import Request, export
from vtp.export.onnx.emit import GraphInput, GraphSpec, WeightStore, emit
from vtp.export.pruners import picture_methods
from vtp.runtime.bundle.folder import Bundle, open_bundle

from ..conftest import MAX_LENGTH
from ..models.tiny import save_tiny
from ..models.tiny_families import save_anyres
from ..models.tiny_split import save_idefics3, save_internvl
from ..models.tiny_video import save_onevision, save_video_llava
from ..once import Once
from ..oracles.tensorrt_10_3 import refused

ENGINE = "tensorrt-rtx"
MISSING = util.find_spec("tensorrt_rtx") is None
Get = Callable[..., Bundle]


@pytest.fixture(scope="module")
def bundle_of(once: Once, model_folder: Callable[[str], Path]) -> Get:
    """A bundle of the tiny model "gqa", exported and verified at the first call."""

    def get(method: str, target: str = "tensorrt", **dtype: str) -> Bundle:
        wishes = {"method": method, "target": target, "max_length": MAX_LENGTH, "verify": "full", **dtype}
        if method != "none":
            wishes["keep_tokens"] = "5"
        return open_bundle(once.bundle(model_folder("gqa"), **wishes))

    return get


@pytest.mark.parametrize("target", ["tensorrt", "jetpack6"])
def test_the_bundle_says_its_target_and_is_float16_by_default(bundle_of: Get, target: str) -> None:
    manifest = bundle_of("adaptprune", target).manifest
    assert (manifest.target, manifest.dtype) == (target, "float16")
    assert manifest.parity["mode"] == "full"  # held against transformers, on ONNX Runtime's CPU provider
    assert "capacity" not in {axis for graph in manifest.graphs.values() for axis in graph.axes}


@pytest.mark.parametrize("method", ["vispruner", "adaptprune"])
def test_only_standard_operators_and_no_float64(bundle_of: Get, method: str) -> None:
    for path in bundle_of(method).folder.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert {item.domain: item.version for item in model.opset_import if item.domain == ""} == {"": 24}
        assert {node.domain for node in model.graph.node} == {""}
        kinds = {item.type.tensor_type.elem_type for item in model.graph.value_info}
        assert onnx.TensorProto.DOUBLE not in kinds


@pytest.mark.parametrize("other", ["tensorrt", "jetpack6"])
def test_a_right_padded_batch_equals_target_ort(
    exported: Callable[[str], Any], bundle_of: Get, other: str
) -> None:
    """Two rows of different length, prefill and one step: logits and cache of the two emitters."""
    answers = []
    for bundle in (open_bundle(exported("none").folder), bundle_of("none", other, dtype="float32")):
        engine = OrtEngine(bundle.path("decoder.onnx"), threads=1)
        answers.append(_prefill_and_step(engine, lengths=(7, 4)))
    for one, two in zip(*answers, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def _prefill_and_step(engine: OrtEngine, lengths: tuple[int, int]) -> list[np.ndarray]:
    """Logits of both runs, then what is valid of every cache."""
    rng, longest = np.random.default_rng(0), max(lengths)
    names = [name for name in engine.inputs if name.startswith("past_key_values.")]
    width = engine.inputs["inputs_embeds"].shape[2]
    heads, _, head = engine.inputs[names[0]].shape[1:]
    caches = {name: engine.zeros((2, heads, MAX_LENGTH, head), "float32") for name in names}
    into = {name.replace("past_key_values", "present"): value for name, value in caches.items()}
    logits, filled = [], np.zeros(2, int)
    for tokens in (longest, 1):
        new = np.array(lengths) if tokens == longest else np.ones(2, int)
        first, filled = filled, filled + new
        feeds = {
            "inputs_embeds": rng.standard_normal((2, tokens, width)).astype(np.float32),
            "position_ids": first[:, None] + np.arange(tokens),
            "seqlens_k": (filled - 1).astype(np.int32),
            "total_sequence_length": np.array(filled.max(), np.int32),
        }
        given = {name: engine.put(value) for name, value in feeds.items()}
        logits.append(engine.run({**given, **caches}, into)["logits"].numpy())
    valid = [value.numpy()[row, :, : filled[row]] for value in caches.values() for row in range(len(lengths))]
    return [*logits, *valid]


# -- what TensorRT 10.3 publishes ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", "vispruner", "adaptprune"])
def test_jetpack6_writes_what_tensorrt_10_3_takes(bundle_of: Get, method: str) -> None:
    folder = bundle_of(method, "jetpack6").folder
    assert [line for path in folder.glob("*.onnx") for line in refused(path)] == []


def test_the_list_refuses_what_the_newer_target_writes(bundle_of: Get) -> None:
    lines = refused(bundle_of("adaptprune").path("decoder.onnx"))
    said = "\n".join(lines)
    assert lines[0] == "opset 24 of domain ''"
    for what in ("RMSNormalization", "RotaryEmbedding", "TensorScatter", "Clip node_clamp: dtype INT64"):
        assert what in said


@pytest.mark.slow
@pytest.mark.parametrize("method", picture_methods()[1:])
def test_every_method_is_in_the_list(tmp_path: Path, method: str) -> None:
    """Whole bundles of eight layers: methods that act at several depths, with all their cues.

    In float16, whose casts the list has to have as well. Numbers are held elsewhere: through eight layers of
    random weights torch's own float16 is 0.7 % of a row away from its float32, and ONNX Runtime's 1.7 %.
    """
    save_tiny(tmp_path / "model", layers=8, vision_layers=2)
    source, out = str(tmp_path / "model"), tmp_path / "bundle"
    wish = Request(out, source, method, "5", target="jetpack6", max_length=64, verify="none")
    assert [line for path in export(wish).folder.glob("*.onnx") for line in refused(path)] == []


@pytest.mark.slow
def test_the_built_in_model_is_in_the_list(tmp_path: Path) -> None:
    bundle = export(Request(tmp_path / "bundle", target="jetpack6"))
    assert [line for path in bundle.folder.glob("*.onnx") for line in refused(path)] == []


# Family: how a tiny model of it is saved, and the picture it is exported for.
FAMILIES: dict[str, tuple[Callable[[Path], Any], tuple[int, int]]] = {
    "llava_next": (lambda path: save_anyres(path, kind="llava_next"), (56, 28)),
    "llava_onevision": (
        lambda path: save_anyres(path, kind="llava_onevision", decoder="qwen2", vision="siglip"),
        (56, 28),
    ),
    "internvl": (save_internvl, (28, 56)),
    "internvl_normed": (lambda path: save_internvl(path, decoder="qwen3", norm_type="rms_norm"), (28, 56)),
    "idefics3": (save_idefics3, (56, 56)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families_are_in_the_list(tmp_path: Path, kind: str) -> None:
    save, size = FAMILIES[kind]
    save(tmp_path / "model")
    wish = Request(
        tmp_path / "bundle",
        str(tmp_path / "model"),
        "vispruner",
        "9",
        target="jetpack6",
        max_length=192,
        image_size=size,
    )
    assert [line for path in export(wish).folder.glob("*.onnx") for line in refused(path)] == []


def test_integers_are_clipped_by_elements(tmp_path: Path) -> None:
    class Clipped(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.clamp(0, 3), x.clamp(min=1), x.clamp(max=2), y.clamp(0, 1)

    inputs = [GraphInput("x", torch.arange(6)), GraphInput("y", torch.ones(2))]
    spec = GraphSpec("clipped", Clipped(), inputs, ["a", "b", "c", "d"])
    path = emit(spec, WeightStore(tmp_path), 20)
    assert [node.op for node in read_graph(path).nodes if node.op in ("Clip", "Max", "Min")].count(
        "Clip"
    ) == 1
    engine = OrtEngine(path)
    given = {"x": engine.put(np.arange(-2, 4)), "y": engine.put(np.array([-1, 2], np.float32))}
    found = {name: value.numpy().tolist() for name, value in engine.run(given).items()}
    assert found == {
        "a": [0, 0, 0, 1, 2, 3],
        "b": [1, 1, 1, 1, 2, 3],
        "c": [-2, -1, 0, 1, 2, 2],
        "d": [0.0, 1.0],
    }


with_library = pytest.mark.skipif(MISSING, reason=f"tensorrt_rtx is not installed: {INSTALL[ENGINE]}")


@pytest.mark.trtrtx
@with_library
@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("none", "tensorrt"),
        ("vispruner", "tensorrt"),
        ("adaptprune", "tensorrt"),
        ("vispruner", "jetpack6"),
        ("adaptprune", "jetpack6"),
    ],
)
def test_every_graph_of_a_bundle_builds(bundle_of: Get, method: str, target: str) -> None:
    """Heads 8 wide, for which TensorRT has no attention kernel: their attention is decomposed."""
    bundle = open_bundle(bundle_of(method, target).folder)
    assert "Attention" not in _operators(bundle)
    _build(bundle)


@pytest.mark.slow
@pytest.mark.trtrtx
@with_library
def test_several_sites_and_the_attention_operator_build(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", layers=4, head_dim=16, vision_layers=2)
    wish = Request(
        tmp_path / "bundle",
        str(tmp_path / "model"),
        "sparsevlm",
        "5",
        target="tensorrt",
        max_length=MAX_LENGTH,
        verify="none",
    )
    bundle = export(wish)
    assert {"Attention", "TensorScatter"} <= _operators(bundle)
    _build(bundle)


@pytest.mark.slow
@pytest.mark.trtrtx
@with_library
@pytest.mark.parametrize(
    ("save", "more"),
    [
        pytest.param(FAMILIES[kind][0], {"image_size": FAMILIES[kind][1]}, id=kind)
        for kind in ("llava_next", "llava_onevision", "idefics3")
    ]
    + [
        pytest.param(save_video_llava, {}, id="video_llava"),
        pytest.param(save_video_llava, {"frames": 2}, id="video_llava-videos"),
        pytest.param(save_onevision, {"frames": 2}, id="llava_onevision-videos"),
    ],
)
def test_families_whose_own_tests_build_nothing_do_build(
    tmp_path: Path, save: Callable[[Path], Any], more: dict[str, Any]
) -> None:
    save(tmp_path / "model")
    wish = Request(
        tmp_path / "bundle",
        str(tmp_path / "model"),
        "divprune",
        "3",
        target="tensorrt",
        max_length=192,
        verify="none",
        **more,
    )
    _build(open_bundle(export(wish).folder))


def _operators(bundle: Bundle) -> set[str]:
    return {node.op for file in bundle.manifest.graphs for node in read_graph(bundle.path(file)).nodes}


def _build(bundle: Bundle) -> None:
    for file, graph in bundle.manifest.graphs.items():
        axes = {**graph.axes, "batch": [1, 1, 1]}
        profile = {
            name: tuple(
                tuple(axes[axis][place] if isinstance(axis, str) else axis for axis in tensor.shape)
                for place in range(3)
            )
            for name, tensor in graph.inputs.items()
        }
        assert refused_nodes(bundle.path(file), ENGINE) == []
        assert build_engine(bundle.path(file), ENGINE, profile).plan.nbytes, file
