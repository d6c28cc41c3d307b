"""What is OpenVINO's own: attention on a cache of its rows, what it refuses, and that it tells nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from vtp.engines import Engine, Value, VtpError, open_graph

pytest.importorskip("openvino", reason="openvino is not installed")

NAME = "openvino-cpu"
HEADS, GROUPS, WIDTH, CAPACITY = 4, 2, 8, 160
FLOAT, WHOLE = TensorProto.FLOAT, TensorProto.INT32


def info(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: Any = ()) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), path)
    return path


def attention(path: Path, more: tuple[str, ...] = (), kind: int = FLOAT, **attributes: Any) -> Path:
    """One GroupQueryAttention of 4 heads over 2, with a cache of CAPACITY places."""
    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total", *more]
    settings = {"num_heads": HEADS, "kv_num_heads": GROUPS, **attributes}
    outputs = ["out", "present_key", "present_value"]
    node = helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", **settings)
    heads = {"query": HEADS, "key": GROUPS, "value": GROUPS, "out": HEADS}
    rows = {name: info(name, kind, ["batch", "sequence", count * WIDTH]) for name, count in heads.items()}
    cache = ["batch", GROUPS, "capacity", WIDTH]
    caches = [info(name, kind, cache) for name in ("past_key", "past_value", *outputs[1:])]
    lengths = [info("seqlens_k", WHOLE, ["batch"]), info("total", WHOLE, [])]
    lengths += [info(name, kind, ["batch", HEADS, "sequence", "total"]) for name in more if name]
    out = rows.pop("out")
    return save(path, [node], [*rows.values(), *caches[:2], *lengths], [out, *caches[2:]])


class Caches:
    """One engine's cache of some rows, and how many tokens of each it holds."""

    def __init__(self, engine: Engine, batch: int) -> None:
        self.engine, self.lengths = engine, np.zeros(batch, np.int32)
        shape = (batch, GROUPS, CAPACITY, WIDTH)
        self.past: dict[str, Value] = {
            f"past_{name}": engine.zeros(shape, "float32") for name in ("key", "value")
        }

    def read(self, tokens: dict[str, np.ndarray], new: np.ndarray) -> np.ndarray:
        """What attention gives for tokens [B,S,.], of which row b has new[b] that count."""
        self.lengths += new
        feeds = {name: self.engine.put(array) for name, array in tokens.items()}
        feeds["seqlens_k"] = self.engine.put(self.lengths - 1)
        feeds["total"] = self.engine.put(np.array(self.lengths.max(), np.int32))
        into = {name.replace("past", "present"): value for name, value in self.past.items()}
        return self.engine.run({**feeds, **self.past}, into)["out"].numpy()


def drawn(rng: np.random.Generator, batch: int, count: int) -> dict[str, np.ndarray]:
    heads = {"query": HEADS, "key": GROUPS, "value": GROUPS}
    return {
        name: rng.normal(size=(batch, count, many * WIDTH)).astype(np.float32) for name, many in heads.items()
    }


def loops(history: list[dict[str, np.ndarray]], row: int, places: list[tuple[int, int]]) -> np.ndarray:
    """The last query of one row over the tokens at (piece, place), in numpy loops: [HEADS*WIDTH]."""
    piece, place = places[-1]
    found = []
    for head in range(HEADS):
        query = history[piece]["query"][row, place].reshape(HEADS, WIDTH)[head]
        keys, values = (
            [history[one][name][row, at].reshape(GROUPS, WIDTH)[head * GROUPS // HEADS] for one, at in places]
            for name in ("key", "value")
        )
        scores = np.array([float(query.astype(np.float64) @ key) / WIDTH**0.5 for key in keys])
        shares = np.exp(scores - scores.max())
        found.append(sum(share * value for share, value in zip(shares / shares.sum(), values, strict=True)))
    return np.concatenate(found)


def test_attention_equals_loops_over_what_every_row_holds(tmp_path: Path) -> None:
    """A right-padded prompt, then steps past a piece's border; row 1 pauses, whose place is written anew."""
    caches = Caches(open_graph(attention(tmp_path / "g.onnx"), NAME, 1), 3)
    rng, history = np.random.default_rng(3), list[dict[str, np.ndarray]]()
    counts = np.array([60, 57, 1], np.int32)
    held: list[list[tuple[int, int]]] = [[(0, place) for place in range(count)] for count in counts]
    history.append(drawn(rng, 3, 60))
    out = caches.read(history[0], counts)
    for row, count in enumerate(counts):
        np.testing.assert_allclose(out[row, count - 1], loops(history, row, held[row]), atol=2e-6)
    for step in range(1, 12):
        going = np.array([1, step % 3 != 0, 1], np.int32)
        history.append(drawn(rng, 3, 1))
        out = caches.read(history[step], going)
        for row in range(3):
            held[row] = [*(held[row] if going[row] else held[row][:-1]), (step, 0)]
            np.testing.assert_allclose(out[row, 0], loops(history, row, held[row]), atol=2e-6)


def test_a_prompt_is_read_on_from_what_the_cache_holds(tmp_path: Path) -> None:
    engine = open_graph(attention(tmp_path / "g.onnx"), NAME, 1)
    tokens = drawn(np.random.default_rng(4), 1, 100)
    whole, parts = Caches(engine, 1), Caches(engine, 1)
    wanted = whole.read(tokens, np.array([100], np.int32))
    for first, last in ((0, 30), (30, 31), (31, 100)):
        part = {name: array[:, first:last] for name, array in tokens.items()}
        found = parts.read(part, np.array([last - first], np.int32))
    np.testing.assert_allclose(found[:, -1], wanted[:, -1], atol=2e-6)
    for name, value in whole.past.items():
        np.testing.assert_array_equal(value.view(), parts.past[name].view())


def test_a_cache_that_is_not_bound_in_place_is_given_whole(tmp_path: Path) -> None:
    engine = open_graph(attention(tmp_path / "g.onnx"), NAME, 1)
    caches, tokens = Caches(engine, 1), drawn(np.random.default_rng(5), 1, 3)
    feeds = {name: engine.put(array) for name, array in tokens.items()}
    feeds |= {"seqlens_k": engine.put(np.array([2], np.int32)), "total": engine.put(np.array(3, np.int32))}
    given = engine.run({**feeds, **caches.past})["present_key"].numpy()
    assert not np.any(caches.past["past_key"].view()) and given.shape == (1, GROUPS, CAPACITY, WIDTH)
    np.testing.assert_array_equal(given[0, :, :3].transpose(1, 0, 2).reshape(3, -1), tokens["key"][0])


def test_a_full_cache_is_one_line_and_stays_as_it_is(tmp_path: Path) -> None:
    caches = Caches(open_graph(attention(tmp_path / "g.onnx"), NAME, 1), 1)
    with pytest.raises(VtpError, match="161 tokens exceed this cache of 160"):
        caches.read(drawn(np.random.default_rng(6), 1, 161), np.array([161], np.int32))
    assert not np.any(caches.past["past_key"].view())


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "window": (lambda path: attention(path, local_window_size=16), "its attention has local_window_size 16"),
    "rotary": (lambda path: attention(path, do_rotary=1), "OpenVINO 20.* cannot load g.onnx: .*do_rotary"),
    "bias": (lambda path: attention(path, ("", "", "", "bias")), "its attention has an input 10"),
    "masks": (lambda path: attention(path, ("", "", "", "bias"), causal=0), "its attention has "),
    "softcap": (lambda path: attention(path, softcap=30.0), "softcap"),
    "float64": (
        lambda path: save(
            path,
            [
                helper.make_node("Cast", ["x"], ["y"], to=TensorProto.DOUBLE),
                helper.make_node("Cast", ["y"], ["z"], to=1),
            ],
            [info("x", FLOAT, [2])],
            [info("z", FLOAT, [2])],
        ),
        "computes in float64, which OpenVINO rounds to float32.* use ort-cpu for it",
    ),
    "operator": (
        lambda path: save(
            path,
            [helper.make_node("TensorScatter", ["x", "new", "at"], ["y"])],
            [info("x", FLOAT, [1, 4, 3]), info("new", FLOAT, [1, 1, 3]), info("at", TensorProto.INT64, [1])],
            [info("y", FLOAT, [1, 4, 3])],
        ),
        "OpenVINO 20.* cannot load g.onnx: .*TensorScatter.*; use --engine ort-cpu",
    ),
    "control flow": (
        lambda path: save(
            path,
            [helper.make_node("Loop", ["x", "", ""], ["y"], body=helper.make_graph([], "b", [], []))],
            [info("x", TensorProto.INT64, [])],
            [info("y", FLOAT, [2])],
        ),
        "control flow",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_graphs_that_it_does_not_run_are_one_line(
    tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without places in the library's sources, on this disk or in memory."""
    make, message = REFUSED[case]
    path = make(tmp_path / "g.onnx")
    with pytest.raises(VtpError, match=message) as caught:
        open_graph(path, NAME)
    said = str(caught.value)
    assert "\n" not in said and not any(part in said for part in (str(tmp_path), "src/", ".cpp", "0x"))
    assert capfd.readouterr() == ("", "")


def test_float32_is_not_rounded_to_bfloat16(tmp_path: Path) -> None:
    """By itself the library computes in bfloat16 where the processor can, whose numbers have 8 bits."""
    rng = np.random.default_rng(7)
    weight = rng.normal(size=(256, 256)).astype(np.float32)
    tensor = helper.make_tensor("w", FLOAT, weight.shape, weight.tobytes(), raw=True)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    rows = [info(name, FLOAT, ["rows", 256]) for name in ("x", "y")]
    engine = open_graph(save(tmp_path / "g.onnx", [node], rows[:1], rows[1:], [tensor]), NAME, 1)
    given = rng.normal(size=(64, 256)).astype(np.float32)
    wanted = given.astype(np.float64) @ weight
    found = engine.run({"x": engine.put(given)})["y"].numpy()
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_sums_are_not_joined_with_what_follows(tmp_path: Path) -> None:
    """OpenVINO 2026.4 would, and read a vector along an axis that is gone: found in Idefics3's splice."""
    nodes = [
        helper.make_node("Less", ["starts", "places"], ["before"]),
        helper.make_node("Cast", ["before"], ["ones"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["ones", "axis"], ["sum"], keepdims=0),
        helper.make_node("Add", ["order", "sum"], ["y"]),
    ]
    places = np.arange(11, dtype=np.int64).reshape(1, 11, 1)
    order = 3 * np.arange(11, dtype=np.int64)
    whole = TensorProto.INT64
    weights = [
        helper.make_tensor("places", whole, places.shape, places.tobytes(), raw=True),
        helper.make_tensor("order", whole, order.shape, order.tobytes(), raw=True),
        helper.make_tensor("axis", whole, [1], [2]),
    ]
    inputs, outputs = [info("starts", whole, ["b", 1, "n"])], [info("y", whole, ["b", 11])]
    engine = open_graph(save(tmp_path / "g.onnx", nodes, inputs, outputs, weights), NAME, 1)
    starts = np.array([[[2, 5, 9]], [[0, 0, 7]]], np.int64)
    wanted = order + (starts < places).sum(axis=2)
    np.testing.assert_array_equal(engine.run({"starts": engine.put(starts)})["y"].numpy(), wanted)


@pytest.mark.parametrize(("rows", "width", "keep"), [(1, 37, 9), (2, 576, 64), (3, 576, 500), (2, 6, 6)])
def test_of_equal_scores_the_lower_index_wins(tmp_path: Path, rows: int, width: int, keep: int) -> None:
    """As on ONNX Runtime: of 37 equal scores OpenVINO's TopK takes any nine, in any order."""
    nodes = [
        helper.make_node("TopK", ["scores", "count"], ["most", "largest"], largest=1),
        helper.make_node("TopK", ["scores", "count"], ["least", "smallest"], largest=0),
        helper.make_node("ArgMax", ["scores"], ["first"], axis=1, keepdims=1),
        helper.make_node("ArgMin", ["scores"], ["lowest"], axis=1, keepdims=0),
        helper.make_node("Add", ["largest", "first"], ["moved"]),
    ]
    count = helper.make_tensor("count", TensorProto.INT64, [1], [keep])
    outputs = [info(name, FLOAT, ["b", keep]) for name in ("most", "least")]
    outputs += [info(name, TensorProto.INT64, ["b", keep]) for name in ("largest", "smallest", "moved")]
    outputs += [info("lowest", TensorProto.INT64, ["b"])]
    inputs = [info("scores", FLOAT, ["b", width])]
    path = save(tmp_path / "g.onnx", nodes, inputs, outputs, [count])
    engines = [open_graph(path, name, 1) for name in (NAME, "ort-cpu")]
    rng = np.random.default_rng(11)
    for levels in (1, 2, 5, 40):
        scores = rng.integers(0, levels, (rows, width)).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
        found, wanted = (engine.run({"scores": engine.put(scores)}) for engine in engines)
        np.testing.assert_array_equal(found["largest"].numpy(), order)
        for name in wanted:
            np.testing.assert_array_equal(found[name].numpy(), wanted[name].numpy(), name)


_LOAD = """
from pathlib import Path
from vtp.engines.openvino.library import load_openvino
import sys
openvino = load_openvino()
print(openvino.convert_model.__name__, "openvino_telemetry" in sys.modules)
"""


def run(script: str, home: Path) -> tuple[list[str], list[str]]:
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "GITHUB_ACTIONS")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env | {"HOME": str(home)}, capture_output=True, text=True, check=True)
    return done.stdout.split(), sorted(path.name for path in home.rglob("*") if path.is_file())


def test_nothing_is_told_of_its_use(tmp_path: Path) -> None:
    """And all of the package is there, the converter with its telemetry's stub included."""
    assert run(_LOAD, tmp_path / "home") == (["convert_model", "False"], [])


def test_the_library_by_itself_keeps_an_identity(tmp_path: Path) -> None:
    """So the test above can fail. No word leaves this machine for it: the sender is taken away."""
    pytest.importorskip("openvino_telemetry", reason="this openvino comes without telemetry")
    mute = (
        "import openvino_telemetry.utils.sender as sender; "
        "sender.TelemetrySender.send = lambda *more: None; import openvino; print('loaded')"
    )
    assert run(mute, tmp_path / "home")[1][:1] == ["openvino_ga_cid"]
