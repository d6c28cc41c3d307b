"""The CPU engines: what they say of a graph, running, binding in place, and refusing in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from vtp.engines import Engine, TensorSpec, VtpError, capabilities, open_graph

HEADS, CAPACITY, WIDTH = 2, 16, 8


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
) -> Path:
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), path)
    return path


def info(name: str, kind: int, shape: list[int | str | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sum [batch,3] = left + right, twice = 2 * left."""
    nodes = [
        helper.make_node("Add", ["left", "right"], ["sum"]),
        helper.make_node("Add", ["left", "left"], ["twice"]),
    ]
    rows = [info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("left", "right", "sum", "twice")]
    return save(tmp_path_factory.mktemp("graphs") / "adder.onnx", nodes, rows[:2], rows[2:])


@pytest.fixture
def engine(adder: Path, cpu_engine: str) -> Engine:
    return open_graph(adder, cpu_engine)


def rows(engine: Engine, *numbers: float) -> dict[str, object]:
    return {
        name: engine.put(np.full((2, 3), number, np.float32))
        for name, number in zip(("left", "right"), numbers, strict=False)
    }


def test_specs_say_names_dtypes_and_axes(engine: Engine) -> None:
    assert engine.inputs == {name: TensorSpec(name, "float32", ("batch", 3)) for name in ("left", "right")}
    assert list(engine.outputs) == ["sum", "twice"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.FLOAT16, "float16"),
        (TensorProto.INT64, "int64"),
        (TensorProto.DOUBLE, "float64"),
        (TensorProto.BOOL, "bool"),
        (TensorProto.UINT8, "uint8"),
    ],
)
def test_every_dtype_has_numpys_name(tmp_path: Path, kind: int, dtype: str, cpu_engine: str) -> None:
    if dtype == "float64" and not capabilities(cpu_engine).float64:
        pytest.skip(f"{cpu_engine} refuses float64, see below")
    tensors = [info(one, kind, [None, 2]) for one in ("x", "y")]
    node = helper.make_node("Identity", ["x"], ["y"])
    engine = open_graph(save(tmp_path / "g.onnx", [node], tensors[:1], tensors[1:]), cpu_engine)
    assert engine.inputs["x"].dtype == dtype
    given = np.ones((3, 2), dtype)
    value = engine.run({"x": engine.put(given)})["y"]
    assert value.dtype == np.dtype(dtype) and value.shape == (3, 2)
    np.testing.assert_array_equal(value.numpy(), given)


def test_run_gives_every_output(engine: Engine) -> None:
    outputs = engine.run(rows(engine, 1, 2))
    assert {name: float(value.numpy()[0, 0]) for name, value in outputs.items()} == {"sum": 3.0, "twice": 2.0}


@pytest.mark.parametrize("bound", [["sum"], ["twice"], ["twice", "sum"]])
def test_outputs_keep_their_names_whichever_are_bound(engine: Engine, bound: list[str]) -> None:
    into = {name: engine.zeros((2, 3), "float32") for name in bound}
    outputs = engine.run(rows(engine, 1, 2), into)
    assert {name: float(value.numpy()[1, 2]) for name, value in outputs.items()} == {"sum": 3.0, "twice": 2.0}
    assert all(outputs[name] is into[name] for name in bound)


def test_put_copies(engine: Engine) -> None:
    array = np.ones((2, 3), np.float32)
    value = engine.put(array)
    array[:] = 9
    assert value.numpy().max() == 1


def test_numpy_is_a_copy_that_outlives_its_value(engine: Engine) -> None:
    value = engine.zeros((2, 3), "float32")
    before = value.numpy()
    value.update(np.ones((2, 3), np.float32))
    assert before.max() == 0
    assert before.flags.owndata
    assert engine.run(rows(engine, 1, 2))["sum"].numpy().flags.owndata


def test_strided_and_foreign_arrays_are_taken(engine: Engine) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2].T
    np.testing.assert_array_equal(engine.put(array).numpy(), array)
    value = engine.zeros((2, 3), "float32")
    value.update(array)
    np.testing.assert_array_equal(value.numpy(), array)


def test_binding_reads_what_its_inputs_hold_now(engine: Engine) -> None:
    feeds = rows(engine, 1, 2)
    binding = engine.bind(feeds, {name: engine.zeros((2, 3), "float32") for name in engine.outputs})
    for number in (5.0, 7.0):
        feeds["left"].update(np.full((2, 3), number, np.float32))  # type: ignore[attr-defined]
        binding.run()
        assert float(binding.outputs["sum"].numpy()[0, 0]) == number + 2


def attention_graph(path: Path) -> Path:
    """One GroupQueryAttention: query, key, value [1,S,16] and a cache of CAPACITY places."""
    width = HEADS * WIDTH
    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=HEADS,
    )
    tokens = [info(name, TensorProto.FLOAT, ["batch", "sequence", width]) for name in (*names[:3], "out")]
    cache = ["batch", HEADS, "capacity", WIDTH]
    caches = [
        info(name, TensorProto.FLOAT, cache)
        for name in ("past_key", "past_value", "present_key", "present_value")
    ]
    lengths = [info("seqlens_k", TensorProto.INT32, ["batch"]), info("total", TensorProto.INT32, [])]
    return save(path, [node], [*tokens[:3], *caches[:2], *lengths], [tokens[3], *caches[2:]])


def test_cache_is_filled_in_place_and_read_back(tmp_path: Path, cpu_engine: str) -> None:
    """One buffer bound as past and as present: five tokens one by one equal five at once."""
    engine = open_graph(attention_graph(tmp_path / "attention.onnx"), cpu_engine, threads=1)
    tokens = np.random.default_rng(0).normal(size=(3, 1, 5, HEADS * WIDTH)).astype(np.float32)

    def run(chunks: list[slice]) -> tuple[np.ndarray, np.ndarray]:
        key, value = (engine.zeros((1, HEADS, CAPACITY, WIDTH), "float32") for _ in range(2))
        for chunk in chunks:
            feeds = {
                name: engine.put(part[:, chunk])
                for name, part in zip(("query", "key", "value"), tokens, strict=True)
            }
            lengths = {
                "seqlens_k": engine.put(np.array([chunk.stop - 1], np.int32)),
                "total": engine.put(np.array(chunk.stop, np.int32)),
            }
            past = {"past_key": key, "past_value": value}
            outputs = engine.run({**feeds, **past, **lengths}, {"present_key": key, "present_value": value})
        assert outputs["present_key"] is key
        return outputs["out"].numpy()[0, -1], key.numpy()

    whole, whole_cache = run([slice(0, 5)])
    steps, steps_cache = run([slice(place, place + 1) for place in range(5)])
    np.testing.assert_allclose(steps, whole, atol=1e-6)
    np.testing.assert_array_equal(steps_cache, whole_cache)
    assert np.any(whole_cache[:, :, 4]) and not np.any(whole_cache[:, :, 5:])


REFUSED: dict[str, tuple[Callable[[Engine], object], str]] = {
    "missing input": (
        lambda engine: engine.run(rows(engine, 1)),
        "input 'right' is missing; the graph takes left, right",
    ),
    "dtype": (
        lambda engine: engine.run({**rows(engine, 1, 2), "left": engine.zeros((2, 3), "float16")}),
        "input 'left' is bound to float16",
    ),
    "fixed axis": (
        lambda engine: engine.run({**rows(engine, 1, 2), "left": engine.zeros((2, 4), "float32")}),
        r"float32\[2, 4\]; the graph wants",
    ),
    "rank": (
        lambda engine: engine.run({**rows(engine, 1, 2), "left": engine.zeros((3,), "float32")}),
        r"float32\[3\]; the graph wants",
    ),
    "uneven batch": (
        lambda engine: engine.run({**rows(engine, 1, 2), "left": engine.zeros((5, 3), "float32")}),
        "failed while running",
    ),
    "output dtype": (
        lambda engine: engine.run(rows(engine, 1, 2), {"sum": engine.zeros((2, 3), "int64")}),
        "output 'sum' is bound to int64",
    ),
    "output shape": (
        lambda engine: engine.run(rows(engine, 1, 2), {"sum": engine.zeros((9, 3), "float32")}),
        "failed while running",
    ),
    "unknown output": (
        lambda engine: engine.run(rows(engine, 1, 2), {"total": engine.zeros((2, 3), "float32")}),
        "no output 'total'; it gives sum, twice",
    ),
    "unbound output": (
        lambda engine: engine.bind(rows(engine, 1, 2), {"sum": engine.zeros((2, 3), "float32")}),
        "no place is bound for output 'twice'",
    ),
    "update dtype": (
        lambda engine: engine.zeros((2, 3), "float32").update(np.ones((2, 3))),
        "cannot take float64",
    ),
    "update shape": (
        lambda engine: engine.zeros((2, 3), "float32").update(np.ones((3, 2), np.float32)),
        r"cannot take float32\[3, 2\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_misuse_is_one_line(engine: Engine, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    act, message = REFUSED[case]
    with pytest.raises(VtpError, match=message) as caught:
        act(engine)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # the library's own log says nothing beside it
    assert float(engine.run(rows(engine, 1, 2))["sum"].numpy()[0, 0]) == 3  # and the engine lives on


def test_closed_engine_is_refused_and_values_live_on(engine: Engine) -> None:
    outputs = engine.run(rows(engine, 1, 2))
    engine.close()
    engine.close()
    with pytest.raises(VtpError, match="closed"):
        engine.run(rows(engine, 1, 2))
    assert float(outputs["sum"].numpy()[0, 0]) == 3


@pytest.mark.parametrize("content", [b"", b"garbage" * 40, None])
def test_file_that_is_no_graph_is_one_line(
    tmp_path: Path, adder: Path, cpu_engine: str, content: bytes | None, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(adder.read_bytes()[:-20] if content is None else content)
    with pytest.raises(
        VtpError, match=r"cannot load broken\.onnx|broken\.onnx is not an ONNX graph"
    ) as caught:
        open_graph(path, cpu_engine)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_attention_that_takes_no_masks_says_which_version_does(tmp_path: Path) -> None:
    """An operator without the attribute, as GroupQueryAttention before onnxruntime 1.30 was."""
    names = ["query", "key", "value"]
    node = helper.make_node(
        "MultiHeadAttention", names, ["out"], domain="com.microsoft", num_heads=2, causal=0
    )
    rows = [info(name, TensorProto.FLOAT, [1, 3, 16]) for name in (*names, "out")]
    path = save(tmp_path / "g.onnx", [node], rows[:3], rows[3:])
    with pytest.raises(VtpError, match=r"g\.onnx, whose attention takes masks: install onnxruntime 1\.30 "):
        open_graph(path, "ort-cpu")


def test_missing_file_is_one_line(tmp_path: Path, cpu_engine: str) -> None:
    with pytest.raises(VtpError, match=r"nothing\.onnx") as caught:
        open_graph(tmp_path / "nothing.onnx", cpu_engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname", "link.bin"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str, cpu_engine: str) -> None:
    """A graph cannot be made to read files beyond its folder as weights."""
    (tmp_path / "outside.bin").write_bytes(bytes(64))
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        weight.external_data.add(key=key, value=value)
    vectors = [info(name, TensorProto.FLOAT, [16]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", vectors[:1], vectors[1:], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (folder / "g.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(VtpError, match=r"cannot load|reads weights from"):
        open_graph(folder / "g.onnx", cpu_engine)
