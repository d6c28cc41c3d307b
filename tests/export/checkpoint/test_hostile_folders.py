"""Model folders of strangers: each is loaded as transformers loads it, or refused in one line, at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
from collections.abc import Callable, Iterator
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
from ...models.tiny_families import save_anyres
from ...models.tiny_gemma import save_gemma, tiny_gemma3, tiny_paligemma
from ...models.tiny_qwen import save_qwen
from ...models.tiny_split import save_idefics3, save_internvl
from ...models.tiny_video import save_video_llava
from ..test_cli import edit, tensors, write
from ..verify.test_streamed import shard

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer_config.json"
Change = Callable[[Path], object]


@pytest.fixture
def folder(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the smallest model, to be spoilt."""
    return Path(shutil.copytree(model_folder("mha"), tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """What waits for ever fails instead: every case here is a matter of seconds."""

    def late(*_: object) -> None:
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


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


# -- numbers and depths --------------------------------------------------------------------------------------

HUGE = 2**31
NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": (
        {"text_config__num_hidden_layers": HUGE},
        r"text_config\.num_hidden_layers .* is 2147483648, but",
    ),
    "tower's layers": ({"vision_config__num_hidden_layers": 10**9}, r"vision_config\.num_hidden_layers"),
    "no layers": ({"text_config__num_hidden_layers": 0}, "is 0; a whole number from 1"),
    "negative layers": ({"text_config__num_hidden_layers": -3}, "is -3; a whole number from 1"),
    "layers in words": ({"text_config__num_hidden_layers": "two"}, "is 'two'; a whole number from 1"),
    "half a layer": ({"text_config__num_hidden_layers": 1.5}, "is 1.5; a whole number from 1"),
    "true layers": ({"text_config__num_hidden_layers": True}, "is True; a whole number"),
    "vocabulary": ({"text_config__vocab_size": 2**40}, r"text_config\.vocab_size .* the longest axis"),
    "vocabulary within": ({"text_config__vocab_size": 60000}, "describes a model of .* weights"),
    "width": ({"text_config__hidden_size": HUGE}, r"text_config\.hidden_size"),
    "inner width": ({"text_config__intermediate_size": 10**12}, "intermediate_size"),
    "heads": ({"text_config__num_attention_heads": 0}, "num_attention_heads .* is 0"),
    "many heads": ({"text_config__num_attention_heads": HUGE}, "num_attention_heads"),
    "kv heads": ({"text_config__num_key_value_heads": -1}, "num_key_value_heads .* is -1"),
    "head size": ({"text_config__head_dim": 0}, "head_dim"),
    "picture": ({"vision_config__image_size": 2**30}, "image_size"),
    "picture within": ({"vision_config__image_size": 600000}, "image_size .* that makes"),
    "no picture": ({"vision_config__image_size": 0}, "image_size .* is 0"),
    "patches": ({"vision_config__patch_size": 0}, "patch_size .* is 0"),
    "large patches": ({"vision_config__patch_size": 60}, "that makes 0"),
    "odd patches": ({"vision_config__patch_size": "14"}, "patch_size .* is '14'"),
    "channels": ({"vision_config__num_channels": HUGE}, "num_channels"),
    "positions": ({"text_config__max_position_embeddings": -1}, "max_position_embeddings .* is -1"),
    "many positions": ({"text_config__max_position_embeddings": 10**18}, "32 bits"),
    "labels": ({"num_labels": HUGE}, "num_labels"),
    "not a number": ({"text_config__rms_norm_eps": float("nan")}, r"rms_norm_eps .* is nan; a finite"),
    "infinite": ({"text_config__rope_theta": float("inf")}, "rope_theta .* is inf; a finite"),
    "beyond 64 bits": ({"text_config__bos_token_id": 10**30}, "64 bits"),
    "beyond 40 digits": ({"image_token_index": 10**100}, "over 40 digits; that is more than 64 bits"),
    "text config": ({"text_config": [1]}, r"text_config .* is \[1\]; a JSON object is needed"),
    "vision config": ({"vision_config": "clip"}, "vision_config .* is 'clip'; a JSON object"),
    "model type": ({"text_config__model_type": ["llama"]}, r"model_type .* is \['llama'\]; a name"),
    "own model type": ({"model_type": {}, "architectures": None}, "unsupported architecture none"),
    "eps in words": ({"text_config__rms_norm_eps": "small"}, "rms_norm_eps"),
    "heads that do not divide": ({"text_config__num_attention_heads": 3}, "cannot load|has .* as"),
    "kv heads that do not divide": ({"text_config__num_key_value_heads": 3}, "cannot load|has .* as"),
    "activation": ({"text_config__hidden_act": "odd"}, "odd"),
    "activation's type": ({"text_config__hidden_act": {}}, "hidden_act"),
    "rope": ({"text_config__rope_parameters": 3}, "rope_parameters .* a JSON object"),
    "rope type": ({"text_config__rope_parameters": {"rope_type": ["x"]}}, "cannot load"),
    "layer types": ({"text_config__layer_types": ["full_attention"] * 9}, "layer_types"),
    "pinpoints": ({"image_grid_pinpoints": [[10**9, 10**9]]}, "image_grid_pinpoints"),
    "image token": ({"image_token_index": "x", "image_token_id": "x"}, "is 'x'; a whole number from 0"),
    "negative token": ({"image_token_index": -7, "image_token_id": -7}, "is -7; a whole number from 0"),
    "feature layer": ({"vision_feature_layer": "x"}, "vision_feature_layer"),
    "architectures": ({"architectures": {"a": 1}, "model_type": None}, "unsupported architecture"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_the_config(folder: Path, name: str) -> None:
    changes, message = NUMBERS[name]
    edit(CONFIG, **changes)(folder)
    refuse(folder, message)


# Tiny models of the other families: how each is written, and the size that it is loaded for.
FAMILIES: dict[str, tuple[Callable[[Path], object], tuple[int, int] | None]] = {
    "llava_next": (lambda path: save_anyres(path, "llava_next"), None),
    "llava_onevision": (lambda path: save_anyres(path, "llava_onevision"), None),
    "paligemma": (lambda path: save_gemma(path, tiny_paligemma()), None),
    "gemma3": (lambda path: save_gemma(path, tiny_gemma3()), None),
    "qwen2_vl": (lambda path: save_qwen(path, "qwen2_vl"), (56, 56)),
    "qwen2_5_vl": (lambda path: save_qwen(path, "qwen2_5_vl"), (56, 56)),
    "qwen3_vl": (lambda path: save_qwen(path, "qwen3_vl"), (64, 64)),
    "idefics3": (save_idefics3, None),
    "internvl": (save_internvl, None),
    "video_llava": (save_video_llava, None),
}


def everywhere(config: dict[str, Any], key: str, value: Any) -> int:
    """Set a key wherever it is in a config; how often that was."""
    parts = [part for part in config.values() if isinstance(part, dict)]
    found = key in config
    if found:
        config[key] = value
    return found + sum(everywhere(part, key, value) for part in parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_bounded_and_needs_no_architectures(family: str, tmp_path: Path) -> None:
    save, size = FAMILIES[family]
    folder = tmp_path / "model"
    save(folder)
    named = json.loads((folder / CONFIG).read_text())["architectures"]
    edit(CONFIG, architectures=None)(folder)
    model = checkpoint.load(folder, "float32", size)
    assert type(model.family.model).__name__ == named[0]
    text, tried = (folder / CONFIG).read_text(), 0
    for key, value in (
        ("num_hidden_layers", 2**31),
        ("depth", 2**31),
        ("hidden_size", 2**40),
        ("vocab_size", 10**7),
        ("image_size", 2**24),
        ("patch_size", 0),
        ("num_heads", 0),
        ("num_attention_heads", -1),
        ("spatial_merge_size", 0),
        ("scale_factor", 0),
        ("downsample_ratio", 0.0),
        ("image_token_id", -7),
        ("image_grid_pinpoints", [[10**9, 10**9]]),
    ):
        config = json.loads(text)
        if everywhere(config, key, value):
            (folder / CONFIG).write_text(json.dumps(config))
            refuse(folder, rf"{key} of .*config\.json is ")
            tried += 1
    assert tried >= 5


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config__window_size": 0},
        {"text_config__rope_parameters__mrope_section": [10**9, 1, 1]},
    ],
    ids=str,
)
def test_what_shows_when_the_graphs_are_planned(tmp_path: Path, change: dict[str, Any]) -> None:
    save_qwen(tmp_path / "model", "qwen2_5_vl")
    edit(CONFIG, **change)(tmp_path / "model")
    request = Request(tmp_path / "out", model=str(tmp_path / "model"), method="none", image_size=(56, 56))
    with pytest.raises(VtpError, match=r"cannot load the model in .*/model: "):
        export(request)


# -- headers of weights --------------------------------------------------------------------------------------


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Rewrite the header of the weights, and leave the numbers as they are."""

    def act(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        told = json.loads(raw[8 : 8 + length])
        text = change(told)
        new = text if isinstance(text, bytes) else json.dumps(told).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])

    return act


def first(told: dict[str, Any]) -> dict[str, Any]:
    return told[next(name for name in told if name != "__metadata__")]


def twice(told: dict[str, Any]) -> bytes:
    name = next(name for name in told if name != "__metadata__")
    return json.dumps(told).replace("{", "{" + f"{json.dumps(name)}: {json.dumps(told[name])}, ", 1).encode()


def set_first(**changes: Any) -> Change:
    return header(lambda told: first(told).update(changes))


def length_of(number: int) -> Change:
    return lambda folder: (folder / WEIGHTS).write_bytes(
        struct.pack("<Q", number) + (folder / WEIGHTS).read_bytes()[8:]
    )


HEADERS: dict[str, Change] = {
    "empty": write(WEIGHTS, b""),
    "seven bytes": write(WEIGHTS, b"1234567"),
    "length of all": length_of(2**64 - 1),
    "length of a gigabyte": length_of(2**30),
    "length of none": length_of(0),
    "length too short": length_of(10),
    "a list": header(lambda told: b"[]"),
    "a number": header(lambda told: b"1"),
    "no UTF-8": header(lambda told: b'{"\xff": 1}'),
    "deep": header(lambda told: b"[" * 100_000),
    "deep metadata": header(lambda told: b'{"__metadata__":' * 5000),
    "offsets beyond": set_first(data_offsets=[0, 2**40]),
    "offsets reversed": set_first(data_offsets=[400, 0]),
    "offsets negative": set_first(data_offsets=[-4, 4]),
    "offsets in words": set_first(data_offsets="all"),
    "offsets overlap": header(
        lambda told: [
            part.update(data_offsets=[0, part["data_offsets"][1] - part["data_offsets"][0]])
            for name, part in told.items()
            if name != "__metadata__"
        ]
    ),
    "shape of all": set_first(shape=[2**40, 2**40]),
    "shape negative": set_first(shape=[-1]),
    "shape in words": set_first(shape="1"),
    "shape overflows to nothing": set_first(shape=[2**63, 2], data_offsets=[0, 0]),
    "dtype": set_first(dtype="F7"),
    "another dtype": set_first(dtype="F64"),
    "dtype is a number": set_first(dtype=4),
    "metadata is a number": header(lambda told: told.update(__metadata__=3)),
    "trailing bytes": lambda folder: (folder / WEIGHTS).open("ab").write(b"x" * 64),
    "cut by a byte": lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(folder: Path, name: str) -> None:
    HEADERS[name](folder)
    refuse(
        folder,
        r"model\.safetensors is not a complete safetensors file \(SafetensorError|cannot load the model",
    )


def test_a_name_twice_in_a_header_is_read_as_by_transformers(folder: Path) -> None:
    header(twice)(folder)
    same_as_transformers(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    shard(folder)
    files = sorted(folder.glob("model-*.safetensors"))
    parts = [load_file(file) for file in files]
    name = next(iter(parts[0]))
    save_file({**parts[1], name: parts[0][name] + 1}, files[1], metadata={"format": "pt"})
    refuse(folder, f"has the tensor {re.escape(name)} in two files")


def test_the_shard_is_named(folder: Path) -> None:
    shard(folder)
    os.truncate(folder / "model-00002-of-00003.safetensors", 100)
    refuse(folder, "model-00002-of-00003.safetensors is not a complete safetensors file")


# -- JSON ----------------------------------------------------------------------------------------------------

JSONS = [CONFIG, TOKENIZER, "generation_config.json", "preprocessor_config.json", "processor_config.json"]
JSONS += [
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "video_preprocessor_config.json",
]
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot read .*: JSONDecodeError"),
    "list": (b"[]", "does not hold a JSON object"),
    "number": (b"1", "does not hold a JSON object"),
    "null": (b"null", "does not hold a JSON object"),
    "string": (b'"x"', "does not hold a JSON object"),
    "cut": (b'{"a": [1, 2', "cannot read .*: JSONDecodeError"),
    "mark of order": (b"\xef\xbb\xbf{}", "cannot read .*: JSONDecodeError: Unexpected UTF-8 BOM"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "cannot read .*: UnicodeDecodeError"),
    "no UTF-8": (b'{"a": "\xff"}', "cannot read .*: UnicodeDecodeError"),
    "deep": (b'{"a":' * 100 + b"1" + b"}" * 100, "more than 64 levels deep"),
    "deeper": (b"[" * 200_000, "cannot read .*: RecursionError"),
    "a number of 5000 digits": (
        b'{"a": ' + b"9" * 5000 + b"}",
        "cannot read .*: ValueError: Exceeds the limit",
    ),
    "large": (b" " * ((16 << 20) + 1), "has 16777217 bytes; at most 16777216"),
}


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize("kind", BROKEN)
def test_json_that_is_none(folder: Path, name: str, kind: str) -> None:
    content, message = BROKEN[kind]
    (folder / name).write_bytes(content)
    refuse(folder, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX, b"[" * 200_000, "cannot read .*index.json: RecursionError"),
        (INDEX, b"[]", "index.json does not hold"),
        ("tokenizer.json", b"[" * 200_000, "cannot load the tokenizer"),
        ("tokenizer.json", b"[]", "cannot load the tokenizer"),
        ("tokenizer.json", b'{"version": "1.0"}', "cannot load the tokenizer"),
        ("quantize_config.json", b"[]", "does not hold a JSON object"),
        ("chat_template.jinja", b"\xff", "cannot load"),
    ],
)
def test_other_files_that_are_none(folder: Path, name: str, content: bytes, message: str) -> None:
    if name == INDEX:
        shard(folder)
    (folder / name).write_bytes(content)
    refuse(folder, message)


def test_a_tokenizer_beyond_all_size(folder: Path) -> None:
    """512 MB that take no room on the disk."""
    os.truncate(folder / "tokenizer.json", (512 << 20) + 1)
    refuse(folder, "tokenizer.json has 536870913 bytes; at most")


TYPES = [None, -1, "x", [1], {"a": {}}, True]


@pytest.mark.parametrize("value", TYPES, ids=repr)
@pytest.mark.parametrize(
    ("file", "key"),
    [
        (TOKENIZER, "eos_token"),
        (TOKENIZER, "added_tokens_decoder"),
        (TOKENIZER, "extra_special_tokens"),
        (TOKENIZER, "tokenizer_class"),
        (TOKENIZER, "model_max_length"),
        (TOKENIZER, "fast_tokenizer_files"),
        ("generation_config.json", "eos_token_id"),
        ("preprocessor_config.json", "size"),
        ("preprocessor_config.json", "image_mean"),
        ("preprocessor_config.json", "crop_size"),
        ("preprocessor_config.json", "image_processor_type"),
        (CONFIG, "rope_scaling"),
        (CONFIG, "dtype"),
        (CONFIG, "id2label"),
        (CONFIG, "image_token_index"),
        (CONFIG, "return_dict"),
    ],
)
def test_types_of_values(folder: Path, file: str, key: str, value: Any) -> None:
    """Loaded or refused in one line: nothing else comes out."""
    edit(file, **{key: value})(folder)
    try:
        checkpoint.load(folder, "float32")
    except VtpError as error:
        assert "\n" not in str(error) and "still waiting" not in str(error)


# -- the hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a hub that cannot be reached."""

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    return tmp_path / "hub"


def test_an_unreached_hub_says_what_to_do(hub: Path) -> None:
    with pytest.raises(VtpError, match=r"ConnectionError: Name or service not known.*hf download org/name"):
        checkpoint.resolve("org/name")


def test_an_offline_hub_is_not_asked(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(VtpError, match=r"HF_HUB_OFFLINE is set: unset it, or download it elsewhere"):
        checkpoint.resolve("org/name")


@pytest.mark.parametrize("offline", [False, True])
def test_a_cached_snapshot_is_used(
    hub: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    cached(folder)
    refs = hub / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abc")
    assert checkpoint.resolve("org/name") == hub / "models--org--name" / "snapshots" / "0123abc"
    checkpoint.load(checkpoint.resolve("org/name"), "float32")


def test_a_hub_that_never_answers(tmp_path: Path) -> None:
    """It takes the connection and says nothing: given up after seconds, not minutes."""
    import subprocess
    import sys

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "vtp.export.cli", "--model", "org/name", "-o", str(tmp_path / "out")],
            env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 1
    assert re.fullmatch(r"vtp-export: error: no such model folder: org/name; .*Timeout.*\n", done.stderr)


# -- float16 -------------------------------------------------------------------------------------------------


def scaled(part: str, factor: float, dtype: torch.dtype = torch.float32) -> Change:
    return tensors(
        lambda found: {
            name: (tensor * factor if part in name else tensor).to(dtype) for name, tensor in found.items()
        }
    )


def in_float16(folder: Path, tmp_path: Path, verify: str) -> str:
    request = Request(
        tmp_path / "out",
        model=str(folder),
        max_length=128,
        method="none",
        dtype="float16",
        verify=verify,
    )
    with pytest.raises(VtpError) as caught:
        export(request)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_a_weight_beyond_float16_is_named(folder: Path, tmp_path: Path) -> None:
    scaled("layers.1.mlp.up_proj", 1e7, torch.bfloat16)(folder)
    text = in_float16(folder, tmp_path, "none")
    assert re.search(
        r"the weight \S*layers\.1\.mlp\.up_proj\.weight holds \S+, beyond float16's 65504", text
    ), text
    assert "--dtype float32" in text


def test_values_beyond_float16_are_named(folder: Path, tmp_path: Path) -> None:
    scaled("multi_modal_projector.linear_2", 30000.0)(folder)
    text = in_float16(folder, tmp_path, "full")
    assert "float16 overflow: projector.onnx gives image_embeds" in text and "--dtype float32" in text
