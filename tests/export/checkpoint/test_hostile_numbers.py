"""Numbers of strangers' configs: each is bounded, or refused in one line, at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtp.engines import VtpError
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.exporter import Request, export

from ...models.tiny_families import save_anyres
from ...models.tiny_gemma import save_gemma, tiny_gemma3, tiny_paligemma
from ...models.tiny_qwen import save_qwen
from ...models.tiny_split import save_idefics3, save_internvl
from ...models.tiny_video import save_video_llava
from ..test_bad_models import edit
from .test_hostile_folders import CONFIG, refuse

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
