"""Model folders of strangers: each is loaded as transformers loads it, or refused in one line, at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vtp.engines import VtpError
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.checkpoint.weights import fill
from vtp.export.exporter import Request, export

from ...conftest import Made
from ..test_bad_models import edit, tensors, write
from ..verify.test_streamed import shard

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer_config.json"
Change = Callable[[Path], object]


def refuse(folder: Path, message: str) -> None:
    """`load` raises one VtpError of one line that says `message`."""
    with pytest.raises(VtpError) as caught:
        checkpoint.load(folder, "float32")
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text and len(text) < 700
    assert "Traceback" not in text and "still waiting" not in text


def same_as_transformers(folder: Path) -> None:
    """Every weight of the model that `load` builds is the one that transformers loads."""
    wanted = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = checkpoint.load(folder, "float32").family.model
    fill(model)
    assert type(model) is type(wanted)
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in wanted.named_parameters(remove_duplicate=False):
        assert torch.equal(found[name], tensor), name


# -- what lies beside the weights ----------------------------------------------------------------------------

# Quantisation configs as the tools write them, and what the line must name.
QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "gptq, 4 bits"),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, "awq, 4 bits"),
    "bnb 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
    "bnb 8": ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes, 8 bits"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
    "compressed": (
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8}}}},
        "compressed-tensors, 8 bits",
    ),
    "torchao": ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": []}, "mxfp4"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
    "of tomorrow": ({"quant_method": "never heard of"}, "never heard of"),
    "without a method": ({"group_size": 4}, "unknown method"),
}


@pytest.mark.parametrize("place", ["", "text_config__"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_weights_are_named(folder: Path, name: str, place: str) -> None:
    config, told = QUANTIZED[name]
    edit(CONFIG, **{f"{place}quantization_config": config})(folder)
    refuse(folder, rf"are quantised \({re.escape(told)}: {place.replace('__', '.')}quantization_config")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128}, r"gptq, 4 bits: quantize_config\.json"),
        ("quant_config.json", {"w_bit": 4, "version": "GEMM"}, r"awq, 4 bits: quant_config\.json"),
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}},
            r"NVFP4: hf_quant_config\.json",
        ),
        ("adapter_config.json", {"peft_type": "LORA"}, "holds an adapter .*merge_and_unload"),
    ],
)
def test_files_beside_the_weights(folder: Path, file: str, content: dict[str, Any], message: str) -> None:
    (folder / file).write_text(json.dumps(content))
    refuse(folder, message)


CHANGES: dict[str, tuple[Change, str]] = {
    "mlx": (edit(CONFIG, quantization={"group_size": 64, "bits": 4}), r"mlx, 4 bits"),
    "older key": (edit(CONFIG, compression_config={"quant_method": "sparseml"}), "sparseml: compression"),
    "fusion": (edit(CONFIG, fusion_config={"patch_embeddings": True}), "sets fusion_config"),
    "per layer": (edit(CONFIG, text_config__per_layer_config={"0": {}}), r"sets text_config\.per_layer_c"),
    "versions": (edit(CONFIG, configuration_files=["config.4.0.0.json"]), "sets configuration_files"),
    "tokenizer's inputs": (edit(TOKENIZER, init_inputs=["/etc/passwd"]), "sets init_inputs"),
    "tokenizer's file": (edit(TOKENIZER, vocab_file="/etc/passwd"), "names '/etc/passwd' as vocab_file"),
    "gguf tokenizer": (edit(TOKENIZER, gguf_file="../x.gguf"), "names '../x.gguf' as gguf_file"),
    "tokenizer versions": (
        edit(TOKENIZER, fast_tokenizer_files=["../tokenizer.4.0.0.json"]),
        r"names '../tokenizer\.4",
    ),
    "float8": (
        tensors(lambda found: {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in found.items()}),
        "is of type F8_E4M3; only float weights",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_transformers_would_act_on(folder: Path, name: str) -> None:
    change, message = CHANGES[name]
    change(folder)
    refuse(folder, message)


def rename(name: str) -> Change:
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.fp16.safetensors", "has model.fp16.safetensors, but neither model.safetensors nor"),
        ("consolidated.safetensors", "has consolidated.safetensors, but neither"),
        (
            "model-00001-of-00002.safetensors",
            "but neither model.safetensors nor model.safetensors.index.json",
        ),
        ("adapter_model.safetensors", "has adapter_model.safetensors, but neither"),
        ("model.gguf", "has model.gguf and no .*GGUF is not supported"),
        ("pytorch_model.bin", "loads no pickled weights"),
        ("shard-00000-model-00001-of-00001.safetensors", "holds a distributed checkpoint"),
    ],
)
def test_weights_that_transformers_loads_otherwise_or_not(folder: Path, name: str, message: str) -> None:
    rename(name)(folder)
    refuse(folder, message)


def decoy(folder: Path, name: str) -> None:
    """The same tensors with other numbers."""
    found = {key: tensor + 1 for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(found, folder / name, metadata={"format": "pt"})


def both(folder: Path) -> None:
    decoy(folder, "model-00001-of-00001.safetensors")
    places = dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def chosen(folder: Path) -> None:
    decoy(folder, "other.safetensors")
    edit(CONFIG, transformers_weights="other.safetensors")(folder)


def chosen_index(folder: Path) -> None:
    both(folder)
    (folder / INDEX).rename(folder / "other.safetensors.index.json")
    edit(CONFIG, transformers_weights="other.safetensors.index.json")(folder)


def leftovers(folder: Path) -> None:
    decoy(folder, "model-00007-of-00009.safetensors")
    decoy(folder, "consolidated.safetensors")
    shard(folder)


def cached(folder: Path) -> None:
    """The folder becomes a snapshot of the hub's cache, one of its blobs shared with other models."""
    cache = folder.parent / "hub"
    blobs, shared = cache / "models--org--name" / "blobs", cache / "blobs" / "ab"
    snapshot = cache / "models--org--name" / "snapshots" / "0123abc"
    for place in (blobs, shared, snapshot):
        place.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        if file.name == WEIGHTS:
            (blobs / f"{number}").rename(shared / "xet")
            (blobs / f"{number}").symlink_to("../../blobs/ab/xet")
    folder.rmdir()
    folder.symlink_to(snapshot)


def tied_otherwise(folder: Path) -> None:
    edit(CONFIG, tie_word_embeddings=True, text_config__tie_word_embeddings=True)(folder)


def tied_alike(folder: Path) -> None:
    tied_otherwise(folder)
    tensors(lambda found: {**found, "lm_head.weight": embeddings(found).clone()})(folder)


def embeddings(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(tensor for name, tensor in found.items() if name.endswith("embed_tokens.weight"))


SERVED: dict[str, Change] = {
    "as it is": lambda folder: None,
    "one file and an index": both,
    "a named file": chosen,
    "a named index": chosen_index,
    "leftovers": leftovers,
    "snapshot of the cache": cached,
    "link to the folder": lambda folder: folder.rename(folder.parent / "far") and folder.symlink_to("far"),
    "link in the folder": lambda folder: (
        rename("real.safetensors")(folder),
        (folder / WEIGHTS).symlink_to("real.safetensors"),
    ),
    "tied, two tables": tied_otherwise,
    "tied, equal tables": tied_alike,
    "another dtype": edit(CONFIG, dtype="bfloat16"),
    "remote code": edit(CONFIG, auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}),
    "attention that is not installed": edit(CONFIG, text_config__attn_implementation="flash_attention_2"),
    "no quantisation": edit(CONFIG, quantization_config=None),
    "null architectures": edit(CONFIG, architectures=None),
    "no architectures": edit(CONFIG, architectures=...),
    "a trainer's own": edit(CONFIG, architectures=["MyTrainerModule"]),
    "keys twice": lambda folder: (folder / CONFIG).write_text(
        (folder / CONFIG).read_text().replace("{", '{"model_type": "odd", ', 1)
    ),
    "what a trainer left": lambda folder: os.truncate(
        write("trainer_state.json", b"[")(folder) and folder / "trainer_state.json", 30 << 20
    ),
    "half precision": tensors(lambda found: {name: tensor.half() for name, tensor in found.items()}),
}


@pytest.mark.parametrize("name", SERVED)
def test_served_as_transformers_serves_it(folder: Path, name: str) -> None:
    SERVED[name](folder)
    same_as_transformers(folder)


def test_remote_code_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    edit(CONFIG, auto_map={"AutoModel": "evil.M", "AutoConfig": "evil.C", "AutoTokenizer": "evil.T"})(folder)
    edit(TOKENIZER, auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})(folder)
    checkpoint.load(folder, "float32")
    assert not (folder / "ran").exists()


def test_without_architectures_the_bundle_is_the_same(
    folder: Path, exported: Callable[[str], Made], tmp_path: Path
) -> None:
    edit(CONFIG, architectures=None)(folder)
    request = Request(tmp_path / "out", model=str(folder), max_length=128, verify="none", method="none")
    files = export(request).manifest.files
    wanted = json.loads((exported("mha").folder / "manifest.json").read_text())["files"]
    assert {name: info.sha256 for name, info in files.items()} == {
        name: info["sha256"] for name, info in wanted.items()
    }


def test_another_class_than_the_model_type_says(folder: Path) -> None:
    """transformers goes by model_type alone."""
    edit(CONFIG, model_type="blip-2")(folder)
    refuse(folder, r"unsupported architecture LlavaForConditionalGeneration \(model_type 'blip-2'\)")


# -- paths and what is not a file ----------------------------------------------------------------------------


def index_of(name: Any) -> Change:
    def change(folder: Path) -> None:
        places = dict.fromkeys(load_file(folder / WEIGHTS), name)
        (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return change


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "/dev/zero.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "a\x1b[31m.safetensors",
        "C:\\x.safetensors",
        "a\0.safetensors",
        "pytorch_model.bin",
        7,
        None,
        ["x.safetensors"],
        {},
    ],
)
def test_names_of_shards(folder: Path, name: Any) -> None:
    index_of(name)(folder)
    refuse(folder, "index.json names .* as a file of weights; only")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "x.bin", 3, [], "x/y.safetensors"])
def test_names_in_transformers_weights(folder: Path, name: Any) -> None:
    edit(CONFIG, transformers_weights=name)(folder)
    refuse(folder, "transformers_weights of .* is .*; give the name of a")


@pytest.mark.parametrize("places", [None, [], {}, 3, "x"])
def test_no_weight_map(folder: Path, places: Any) -> None:
    index_of("x.safetensors")(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    refuse(folder, "has no weight_map")


def leads_out(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to("../outside")

    return change


FILES = [
    CONFIG,
    WEIGHTS,
    "tokenizer.json",
    TOKENIZER,
    "generation_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
]
EXTRA = ["special_tokens_map.json", "added_tokens.json", "video_preprocessor_config.json", INDEX]
EXTRA += ["chat_template.json", "vocab.json", "tokenizer.model", "quantize_config.json", "merges.txt"]


@pytest.mark.parametrize("name", FILES)
def test_links_out_of_the_folder(folder: Path, name: str) -> None:
    leads_out(name)(folder)
    refuse(folder, f"{re.escape(name)} is a link that leaves the model folder")


def test_a_snapshot_whose_links_leave_the_cache(folder: Path) -> None:
    cached(folder)
    link = folder / "tokenizer.json"
    target = folder.parent / "outside.json"
    shutil.copy(link, target)
    link.unlink()
    link.symlink_to(target)
    refuse(folder, "tokenizer.json is a link that leaves")


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device"])
@pytest.mark.parametrize("name", [*FILES, *EXTRA, "additional_chat_templates/x.jinja"])
def test_what_is_no_regular_file(
    folder: Path, name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(path.parent)  # names of sockets have at most 107 bytes
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(path.name)
    word = {"pipe": "a named pipe", "folder": "a folder", "socket": "a socket"}.get(kind, "a device")
    refuse(folder, f"{re.escape(name)} is {word} where a regular file is needed")


def test_a_pipe_as_the_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VtpError, match="is a file; give the folder"):
        checkpoint.resolve(str(tmp_path / "pipe"))


@pytest.mark.parametrize(
    "name", ["x" * 300, "a\0b", "~nobody-of-that-name/x", "org/" + "n" * 200, "o g/n", "/"]
)
def test_names_that_are_no_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(VtpError) as caught:
        checkpoint.check(checkpoint.resolve(name))
    assert "\n" not in str(caught.value)
