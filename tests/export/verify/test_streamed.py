"""Streamed export: weights stay on the disk until they are written, and layers are checked one by one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import load_external_data_for_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, LlavaForConditionalGeneration

from vtp.bench.shapes.models import write_weights
from vtp.engines import VtpError
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.checkpoint import weights
from vtp.export.checkpoint.weights import Weights, fill, real, source_of, stand_in, streamed
from vtp.export.exporter import Request, export
from vtp.export.onnx import slices
from vtp.export.onnx.emit import GraphInput, GraphSpec, WeightStore, emit
from vtp.runtime.bundle.folder import open_bundle

from ...models.tiny import pixels, prompt_ids, save_tiny, text_config

KEEP = "6"


def shard(folder: Path, change: Callable[[str], str] = str, parts: int = 3) -> None:
    """Rewrite a folder's weights as `parts` shards with an index, names changed by `change`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number in range(parts):
        file = f"model-{number + 1:05}-of-{parts:05}.safetensors"
        chosen = dict(list(tensors.items())[number::parts])
        save_file({change(name): tensor for name, tensor in chosen.items()}, folder / file)
        places.update({change(name): file for name in chosen})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def request(output: Path, model: Path, **wishes: Any) -> Request:
    return Request(output, model=str(model), max_length=128, **{"verify": "none", **wishes})


def numbers(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Every initializer of every graph of a bundle."""
    found = {}
    for path in sorted(folder.glob("*.onnx")):
        model = onnx.load(path)
        load_external_data_for_model(model, str(folder))
        found[path.name] = {
            tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
        }
    return found


# -- stand-ins -----------------------------------------------------------------------------------------------


def test_a_loaded_model_holds_no_weights(model_folder: Callable[[str], Path]) -> None:
    model = checkpoint.load(model_folder("tied"), "float16").family.model
    wanted = LlavaForConditionalGeneration.from_pretrained(model_folder("tied"), dtype=torch.float16)
    assert model.dtype == torch.float16
    stored = sum(tensor.untyped_storage().nbytes() for tensor in model.parameters())
    assert stored == 2 * len(list(model.parameters()))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    for name, tensor in wanted.named_parameters():
        here = model.get_parameter(name)
        assert here.isnan().all() and torch.equal(real(here), tensor), name
    for name, buffer in wanted.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    fill(model)
    for name, tensor in wanted.named_parameters():
        assert torch.equal(model.get_parameter(name), tensor), name


def test_a_cut_stand_in_is_refused_by_name(model_folder: Callable[[str], Path]) -> None:
    model = checkpoint.load(model_folder("mha"), "float32").family.model
    weight = model.lm_head.weight
    assert source_of(weight) is not None and source_of(torch.ones(3)) is None
    with pytest.raises(VtpError, match=r"weight language_model\.lm_head\.weight \[384, 16\] was cut to \[2"):
        source_of(weight[:2])


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("transposed", [False, True])
def test_pieces_are_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, transposed: bool
) -> None:
    tensor = torch.randn(23, 5).to(torch.bfloat16)
    save_file({"x": tensor, "scalar": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(weights, "_PIECE_BYTES", rows * 5 * 2)
    source = Weights(tmp_path, torch.float16).sources["x"]
    pieces = list(source.pieces(transposed))
    assert len(pieces) == (1 if transposed else -(-23 // rows))
    whole = torch.cat([piece.flatten() for piece in pieces])
    assert torch.equal(whole, (tensor.T if transposed else tensor).to(torch.float16).flatten())
    scalar = Weights(tmp_path, torch.float32).sources["scalar"]
    assert [piece.item() for piece in scalar.pieces()] == [3.0]


def test_weights_that_transformers_joins_are_loaded_for_it(tmp_path: Path) -> None:
    """Names that no parameter of the model came from are read, so that what was computed of them is real."""
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    found = Weights(tmp_path, torch.float32)
    model = nn.Module()
    state = found.state()
    model.a = nn.Parameter(state["a"])
    assert found.converted(model) == []
    model.joined = nn.Parameter(torch.cat([state["b"], state["b"]]))
    assert found.converted(model) == ["b"]
    again = found.state(["b"])
    assert torch.equal(again["b"], torch.zeros(2, 3)) and source_of(again["a"]) is not None


def test_a_constant_made_of_stand_ins_is_refused(tmp_path: Path) -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", stand_in((4, 4), torch.float32) * 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.table

    spec = GraphSpec("made", Made(), [GraphInput("x", torch.ones(2, 4))], ["y"])
    with pytest.raises(VtpError, match=r"graph made holds the constant .*computed from weights before they"):
        emit(spec, WeightStore(tmp_path))
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize("size", [0, 1 << 40])
def test_a_streamed_model_computes_what_a_loaded_one_does(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Whether its weights are read in passing (size 0) or all small enough to load."""
    for name in ("_SMALL_BYTES", "_TABLE_BYTES"):
        monkeypatch.setattr(weights, name, size)
    monkeypatch.setattr(weights, "_PIECE_BYTES", 1000)
    folder, ids = model_folder("qwen2"), prompt_ids(16)
    model = checkpoint.load(folder, "float16").family.model
    wanted = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float16).float().eval()
    given = {"input_ids": ids, "pixel_values": pixels()}
    with torch.no_grad(), streamed(model):
        logits = model(**given).logits
        assert bool(model.lm_head.weight.isnan().all()) == (size == 0)
        assert (logits - wanted(**given).logits).abs().max() < 1e-4


# -- the export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "adaptprune", "tied", "float16"])
def test_graphs_hold_the_checkpoints_numbers(exported: Callable[[str], Any], name: str) -> None:
    """Every large matrix is one of the checkpoint's or its transpose, rounded to the bundle's dtype."""
    made = exported(name)
    dtype = np.float16 if name == "float16" else np.float32
    model = load_file(made.model / "model.safetensors")
    known = {tensor.numpy().astype(dtype).tobytes() for tensor in model.values()}
    known |= {
        tensor.T.contiguous().numpy().astype(dtype).tobytes() for tensor in model.values() if tensor.ndim == 2
    }
    found = numbers(made.folder)
    for graph in ("vision_encoder.onnx", "projector.onnx", "decoder.onnx"):
        arrays = [array for array in found[graph].values() if array.dtype == dtype and array.ndim > 1]
        assert len(arrays) >= 2
        odd = [array.shape for array in arrays if array.size > 64 and array.tobytes() not in known]
        assert not odd, graph


def today(name: str) -> str:
    """As transformers has named LLaVA's parameters since version 4.52."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def older(name: str) -> str:
    """The vision tower as it was named before transformers 5."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("change", [str, today, older])
def test_shards_and_names_of_other_times_are_the_same_model(
    model_folder: Callable[[str], Path], tmp_path: Path, change: Callable[[str], str]
) -> None:
    """The hub has LLaVAs under several namings; transformers maps them, and stand-ins follow."""
    folder = Path(shutil.copytree(model_folder("gqa"), tmp_path / "model"))
    shard(folder, change)
    wanted = checkpoint.load(model_folder("gqa"), "float32").family.model
    model = checkpoint.load(folder, "float32").family.model
    for name, tensor in wanted.named_parameters():
        source = source_of(model.get_parameter(name))
        assert source is not None and torch.equal(source.read(), real(tensor)), name


@pytest.mark.slow
def test_a_sharded_checkpoint_gives_the_same_bundle(exported: Callable[[str], Any], tmp_path: Path) -> None:
    made = exported("adaptprune")
    folder = Path(shutil.copytree(made.model, tmp_path / "model"))
    shard(folder, today)
    bundle = export(request(tmp_path / "bundle", folder, method="adaptprune", keep_tokens="4,7"))
    assert {path.name for path in bundle.folder.iterdir()} == {path.name for path in made.folder.iterdir()}
    for path in bundle.folder.iterdir():
        if path.name != "manifest.json":  # it has the model's name
            assert path.read_bytes() == (made.folder / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_bfloat16_checkpoints_are_served(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", layers=2, dtype=torch.bfloat16)
    assert AutoConfig.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    bundle = export(request(tmp_path / "bundle", tmp_path / "model", method="none", verify="full"))
    assert bundle.manifest.dtype == "float32"


SPOILS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (
        lambda found: found.pop("language_model.model.layers.1.mlp.up_proj.weight"),
        r"lacks the tensor model\.language_model\.layers\.1\.mlp\.up_proj\.weight$",
    ),
    "extra": (
        lambda found: found.update({"language_model.model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}),
        r"has no place for: model\.language_model\.layers\.7\.mlp\.up_proj\.weight$",
    ),
    "misshapen": (
        lambda found: found.update({"language_model.lm_head.weight": torch.ones(384, 17)}),
        r"has lm_head\.weight as \[384, 17\]; its config says \[384, 16\]$",
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_shards_that_do_not_fit_the_config_are_refused(
    model_folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    change, message = SPOILS[name]
    folder = Path(shutil.copytree(model_folder("mha"), tmp_path / "model"))
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    shard(folder)
    with pytest.raises(VtpError, match=message):
        export(request(tmp_path / "bundle", folder, method="none"))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_shard_that_is_not_there_is_named(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("mha"), tmp_path / "model"))
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(VtpError, match=r"cannot load the model .*/model-00002-of-00003\.safetensors"):
        export(request(tmp_path / "bundle", folder, method="none"))


# -- --verify layers -----------------------------------------------------------------------------------------


@pytest.fixture
def one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models would be small enough to load whole: stream them nevertheless."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 0)
    for name in ("_SMALL_BYTES", "_TABLE_BYTES"):
        monkeypatch.setattr(weights, name, 0)


@pytest.mark.usefixtures("one_layer_at_a_time")
@pytest.mark.parametrize(
    ("model", "method", "dtype", "graphs"),
    [
        pytest.param(
            "gqa",
            "vispruner",
            "float16",
            {"vision_encoder": {"0"}, "decoder": {"before 0", "0", "1"}},
            marks=pytest.mark.slow,
        ),
        (
            "tied",
            "adaptprune",
            "float32",
            {"decoder_head": {"before 0", "0"}, "decoder": {"before 2"}},
        ),
    ],
)
def test_layers_are_held_against_transformers(
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    model: str,
    method: str,
    dtype: str,
    graphs: dict[str, set[str]],
) -> None:
    wishes = {"method": method, "keep_tokens": KEEP, "dtype": dtype, "verify": "layers"}
    bundle = export(request(tmp_path / "bundle", model_folder(model), **wishes))
    parity = bundle.manifest.parity
    assert {name: set(found) for name, found in parity["layers"].items()} == graphs
    limit = {"float32": 1e-4, "float16": 1e-2}[dtype]
    assert all(0 <= gap < limit for found in parity["layers"].values() for gap in found.values())
    assert parity["mode"] == "layers" and parity["generation"][KEEP]["equal"] == parity["steps"] == 2
    assert {name for name, count in parity["borders"].items() if count} == set(graphs)
    assert set(parity["graphs"]) >= {"vision_encoder", "projector", "pruner", "splice", "embed_tokens"}
    files = {path.name for path in bundle.folder.iterdir()}
    assert files == {*bundle.manifest.files, "manifest.json"}  # no slice is left behind
    open_bundle(bundle.folder, check_hashes=True)


def spoil_weight(monkeypatch: pytest.MonkeyPatch, graph: str, weight: str) -> None:
    """Change one matrix of a graph after it was written, as a bug would: its rows in reverse."""
    before = WeightStore.externalize

    def externalize(store: WeightStore, model: Any, name: str) -> None:
        before(store, model, name)
        if name == graph:
            tensor = model.graph.initializers[weight].const_value
            path = store.folder / tensor.location
            data = bytearray(path.read_bytes())
            part = slice(tensor.offset, tensor.offset + tensor.length)
            data[part] = np.ascontiguousarray(tensor.numpy()[::-1]).tobytes()
            path.write_bytes(data)

    monkeypatch.setattr(WeightStore, "externalize", externalize)


@pytest.mark.usefixtures("one_layer_at_a_time")
@pytest.mark.parametrize(
    ("graph", "weight", "message"),
    [
        (
            "decoder",
            "decoder_layers.1.mlp.down_proj.weight",
            "after layer 1 of decoder, hidden states differ",
        ),
        (
            "vision_encoder",
            "layers.0.mlp.fc2.weight",
            "after layer 0 of vision_encoder, hidden states differ",
        ),
        ("decoder", "lm_head.weight", "logits|greedy token"),
    ],
)
def test_a_wrong_weight_is_found_and_its_layer_named(
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
    weight: str,
    message: str,
) -> None:
    spoil_weight(monkeypatch, graph, weight)
    wishes = {"method": "vispruner", "keep_tokens": KEEP, "verify": "layers"}
    with pytest.raises(VtpError, match=f"fidelity check failed: .*{message}"):
        export(request(tmp_path / "bundle", model_folder("gqa"), **wishes))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("one_layer_at_a_time")
def test_a_check_by_layers_that_compares_none_fails(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a graph whose borders are not found: what else was compared is not what was asked for."""
    monkeypatch.setattr("vtp.export.verify.by_layers.Layers.borders", lambda layers, graph: {})
    wishes = {"method": "none", "verify": "layers"}
    with pytest.raises(VtpError, match="no border between layers was compared"):
        export(request(tmp_path / "bundle", model_folder("tied"), **wishes))
    assert not list(tmp_path.iterdir())


# -- memory --------------------------------------------------------------------------------------------------

_MEASURE = """
import json, sys, threading
from pathlib import Path
from vtp.export.exporter import Request, export

def anonymous():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return int(fields["RssAnon"].split()[0]) * 1024

def run(folder, output):
    wishes = {"method": "vispruner", "keep_tokens": "6", "dtype": "float16", "max_length": 128}
    export(Request(Path(output), model=folder, verify=sys.argv[1], **wishes))

peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())

run(sys.argv[2], sys.argv[3] + "-small")  # what the libraries take is no part of the figure
before, watcher = anonymous(), threading.Thread(target=watch)
watcher.start()
run(sys.argv[3], sys.argv[3] + "-bundle")
done.set()
watcher.join()
print(json.dumps(peak[0] - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux' /proc")
@pytest.mark.parametrize(("verify", "most"), [("none", 0.5), ("layers", 2.0)])
def test_the_peak_of_memory_goes_with_the_model(tmp_path: Path, verify: str, most: float) -> None:
    """Anonymous memory of a process that exports a float16 model of 230 MB, above what it had before.

    The check by layers opens 128 MB of weights at a time, twice and in float32: of a model this small that is
    more than half. It is held to less than the model in float32, which a whole check has in memory twice.
    """
    save_tiny(tmp_path / "tiny", layers=2)
    big = Path(shutil.copytree(tmp_path / "tiny", tmp_path / "big"))
    (big / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(big)
    config.text_config = text_config("llama", 12, 12, 12, 64, False, intermediate_size=3072)
    write_weights(config, "LlavaForConditionalGeneration", big, "float16")
    size = sum(path.stat().st_size for path in big.glob("*.safetensors"))
    assert size > 220e6
    command = [sys.executable, "-c", _MEASURE, verify, str(tmp_path / "tiny"), str(big)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = json.loads(done.stdout.splitlines()[-1])
    assert 0 < grown < most * size, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
