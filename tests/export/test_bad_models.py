"""vtp-export of models that cannot be served: one line of error, and nothing half-written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .test_cli import nothing_left, refuse


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file, "a__b" for nested ones; ... removes."""

    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        for path, value in changes.items():
            *steps, last = path.split("__")
            place = data
            for step in steps:
                place = place[step]
            if value is ...:
                place.pop(last, None)
            else:
                place[last] = value
        (folder / name).write_text(json.dumps(data))

    return change


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return act


def without(part: str) -> Callable[[Path], None]:
    return tensors(lambda found: {name: tensor for name, tensor in found.items() if part not in name})


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def misshapen(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in found if name.endswith("layers.0.mlp.up_proj.weight") and "language" in name)
    return {**found, name: found[name][:-1].contiguous()}


def endless(folder: Path) -> None:
    edit("generation_config.json", eos_token_id=...)(folder)
    edit("tokenizer_config.json", eos_token=...)(folder)


CONFIG = "config.json"
BLIP = "Blip2ForConditionalGeneration"
BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (remove(CONFIG), "it has no config.json"),
    "config is no JSON": (write(CONFIG, b"{"), r"cannot read .*config\.json: JSONDecodeError"),
    "config is no text": (write(CONFIG, b"\xff\xfe"), r"cannot read .*config\.json"),
    "config is a list": (write(CONFIG, b"[]"), "does not hold a JSON object"),
    "architecture": (
        edit(CONFIG, architectures=[BLIP], model_type="blip-2"),
        f"unsupported architecture {BLIP}; supported, each with ForConditionalGeneration behind: .* Llava, ",
    ),
    "an architecture that is known": (
        edit(CONFIG, architectures=["FastVlmForConditionalGeneration"], model_type="fast_vlm"),
        "FastVlmForConditionalGeneration is not supported: .* a model of timm",
    ),
    "no architecture": (
        edit(CONFIG, architectures=..., model_type="odd"),
        "unsupported architecture none .model_type 'odd'",
    ),
    "architecture is a number": (
        edit(CONFIG, architectures=[3], model_type=...),
        "unsupported architecture 3",
    ),
    "decoder": (
        edit(CONFIG, text_config__model_type="gemma"),
        "decoder is 'gemma'; supported decoders: llama",
    ),
    "tower": (
        edit(CONFIG, vision_config__model_type="vit"),
        "tower is 'vit'; supported towers: clip_vision_model",
    ),
    "feature layers": (
        edit(CONFIG, vision_feature_layer=[-1, -2]),
        r"vision_feature_layer is \[-1, -2\]; only one",
    ),
    "feature layer": (
        edit(CONFIG, vision_feature_layer=-9),
        "vision_feature_layer -9 is not one of the tower's 2",
    ),
    "strategy": (
        edit(CONFIG, vision_feature_select_strategy="full"),
        "'full' with a 'clip_vision_model' tower",
    ),
    "rotary": (
        edit(CONFIG, text_config__rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "rotary embedding is 'dynamic'; supported: default",
    ),
    "positions": (
        edit(CONFIG, text_config__max_position_embeddings=16),
        "knows 16 positions: too few for its 16",
    ),
    "image token": (edit(CONFIG, image_token_index=99, image_token_id=99), "cannot be prompted: .*id 4"),
    "no tokenizer": (remove("tokenizer.json"), r"has no tokenizer: one of tokenizer\.json"),
    "bad tokenizer": (write("tokenizer.json", b"{}"), "cannot load the tokenizer"),
    "no processor": (remove("preprocessor_config.json", "processor_config.json"), "has no image processor"),
    "bad processor": (write("preprocessor_config.json", b"?"), r"cannot read .*preprocessor_config\.json"),
    "other size": (
        edit("processor_config.json", image_processor__crop_size={"height": 70, "width": 70}),
        r"makes \(70, 70\) pixels",
    ),
    "odd processor": (
        edit("processor_config.json", image_processor__image_processor_type="Odd"),
        "'Odd' is not supported; supported",
    ),
    "bad template": (write("chat_template.jinja", b"{% if %}"), "cannot be prompted: .*does not compile"),
    "template without image": (write("chat_template.jinja", b"hello"), "cannot be prompted: "),
    "no end": (endless, "names no end-of-sequence token; add eos_token_id"),
    "odd end": (edit("generation_config.json", eos_token_id="x"), "eos_token_id of .* is 'x'; give an id"),
    "missing tensor": (
        without("layers.1.mlp.up_proj"),
        r"lacks the tensor model\.language_model\.layers\.1\.mlp",
    ),
    "extra tensor": (
        tensors(lambda found: {**found, "model.language_model.layers.9.x": torch.ones(3)}),
        r"no place for: model\.language_model\.layers\.9\.x",
    ),
    "misshapen tensor": (tensors(misshapen), r"up_proj\.weight as \[31, 16\]; its config says \[32, 16\]"),
    "truncated weights": (cut, "cannot load the model in .*SafetensorError"),
    "garbage weights": (write("model.safetensors", b"garbage" * 50), "SafetensorError"),
    "empty weights": (write("model.safetensors", b""), "SafetensorError"),
    "lost shard": (lost_shard, "No such file or directory: .*model-00002-of-00002"),
    "pickled weights": (pickled, r"has no \*\.safetensors; vtp loads no pickled weights"),
}
# Known from the folder alone: said before anything is loaded, with no other line at all.
AT_ONCE = {"no config", "architecture", "decoder", "tower", "feature layers", "no tokenizer", "no processor"}
AT_ONCE |= {"pickled weights", "config is no JSON", "config is a list"}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(
    spoil: Callable[[Callable[[Path], object]], list[str]],
    tmp_path: Path,
    name: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    change, message = BAD_MODELS[name]
    argv = spoil(change)
    capfd.readouterr()
    refuse(argv, 1, message, capfd, silent=name in AT_ONCE)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "no such model folder: /no/such/folder; give a folder"),
        ("./nothing", "no such model folder: ./nothing"),
        ("nothing", "no such model folder: nothing"),
        ("README.md", "model README.md is a file"),
    ],
)
def test_no_such_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "README.md").write_text("x")
    monkeypatch.chdir(tmp_path)
    refuse(["--model", model, "-o", "out"], 1, re.escape(message), capfd, silent=True)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_hub_id_without_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    message = "org/name; .* the hub did not give it .ConnectionError: Name or service not known"
    refuse(["--model", "org/name", "-o", str(tmp_path / "out")], 1, message, capfd)
