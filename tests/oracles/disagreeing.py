"""Model folders in which every pair of files and keys that can say the same thing disagrees.

`strip` then takes away whichever wins, so that each of them wins once over all that are below it. The words
of every template begin with its own mark, and pixels of every image processor have a mean of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..models.tiny import save_tiny
from ..models.tiny_families import save_anyres
from ..models.tiny_gemma import save_gemma, tiny_gemma3, tiny_paligemma
from ..models.tiny_gemma4 import save_gemma4
from ..models.tiny_qwen import save_qwen
from ..models.tiny_split import save_idefics3, save_internvl
from ..models.tiny_video import save_next_video, save_video_llava

# Family -> how a tiny model's folder is written, and the processor class of published folders.
FAMILIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "llava": (lambda path: save_tiny(path, layers=2, vision_layers=2), "LlavaProcessor"),
    "llava_next": (lambda path: save_anyres(path, "llava_next"), "LlavaNextProcessor"),
    "llava_onevision": (
        lambda path: save_anyres(path, "llava_onevision", vision="siglip"),
        "LlavaOnevisionProcessor",
    ),
    "video_llava": (save_video_llava, "VideoLlavaProcessor"),
    "llava_next_video": (save_next_video, "LlavaNextVideoProcessor"),
    "qwen2_vl": (lambda path: save_qwen(path, "qwen2_vl"), "Qwen2VLProcessor"),
    "qwen2_5_vl": (lambda path: save_qwen(path, "qwen2_5_vl"), "Qwen2_5_VLProcessor"),
    "qwen3_vl": (lambda path: save_qwen(path, "qwen3_vl", depth=3), "Qwen3VLProcessor"),
    "gemma3": (lambda path: save_gemma(path, tiny_gemma3()), "Gemma3Processor"),
    "gemma4": (save_gemma4, "Gemma4Processor"),
    "paligemma": (lambda path: save_gemma(path, tiny_paligemma()), "PaliGemmaProcessor"),
    "internvl": (save_internvl, "InternVLProcessor"),
    "idefics3": (save_idefics3, "Idefics3Processor"),
    "smolvlm": (lambda path: save_idefics3(path, kind="smolvlm"), "SmolVLMProcessor"),
}
# What processors' own files say of how many tokens a picture has, where it is not said elsewhere.
_COUNTS: dict[str, dict[str, Any]] = {
    "llava": {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    "llava_next": {
        "patch_size": 7,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    "llava_next_video": {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    "llava_onevision": {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    "video_llava": {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    "gemma3": {"image_seq_length": 16},
    "internvl": {"image_seq_length": 4},
    "idefics3": {"image_seq_len": 4},
    "smolvlm": {"image_seq_len": 4},
}
# Settings of an image processor that its processor's class overrules.
_OVERRULED = {"gemma3": {"do_pan_and_scan": True}, "internvl": {"crop_to_patches": False}}
PROCESSOR, IMAGES, TOKENIZER = "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"
# What wins is taken away after each of these; the first folder is whole.
STEPS = ("whole", "no nested settings", "no template.json", "no processor file", "no template files")


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file, which may be new; ... removes one."""
    data = json.loads(path.read_text()) if path.is_file() else {}
    data |= changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def save_disagreeing(name: str, folder: Path) -> Any:
    """Write a family's folder, and say everything otherwise in every other place; returns the model."""
    save, owner = FAMILIES[name]
    model = save(folder)
    settings, template = _image_settings(folder), _template(folder)
    wrong = {
        "size": {"height": 9, "width": 9},
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
    }
    nested = {
        **settings,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.4, 0.3],
        "rescale_factor": 1 / 200,
    }
    nested |= _OVERRULED.get(name, {})
    edit(folder / PROCESSOR, image_processor=nested, processor_class=owner, **_COUNTS.get(name, {}))
    losing = {**settings, **wrong, "image_mean": [0.9, 0.9, 0.9], "processor_class": "CLIPProcessor"}
    edit(folder / IMAGES, **losing)
    edit(folder / TOKENIZER, processor_class="BlipProcessor", image_std=[0.2, 0.3, 0.6])
    if template is not None:
        _templates(folder, template)
    _generation(folder)
    (folder / "right.json").write_text(json.dumps({"settings": settings, "owner": owner}))
    return model


def _image_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings as they were saved, wherever that is."""
    path = folder / IMAGES
    if path.is_file():
        return json.loads(path.read_text())
    return json.loads((folder / PROCESSOR).read_text())["image_processor"]


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    return path.read_text() if path.is_file() else None


def _templates(folder: Path, template: str) -> None:
    """The same template in every place, each with its own mark in front of the turns' words."""

    def marked(mark: str) -> str:
        head, text, tail = template.rpartition("{% if add_generation_prompt %}")
        if not text:
            head, text, tail = template.rpartition("{%- if add_generation_prompt -%}")
        assert text
        return f"{head}{mark} {text}{tail}"

    edit(folder / PROCESSOR, chat_template={"default": marked("nested"), "tool_use": marked("tools")})
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": marked("legacy")}))
    (folder / "chat_template.jinja").write_text(marked("raw"))
    named = [{"name": "a", "template": marked("a")}, {"name": "default", "template": marked("tokens")}]
    edit(folder / TOKENIZER, chat_template=[*named, {"name": "z", "template": marked("z")}])


def _generation(folder: Path) -> None:
    """Generation settings in generation_config.json, config.json and the text model's config."""
    edit(
        folder / "generation_config.json",
        eos_token_id=[3, 2],
        repetition_penalty=1.25,
        suppress_tokens=[70, 80],
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": 6, "repetition_penalty": 1.5, "min_length": 40}
    config["text_config"] |= {"eos_token_id": 5, "repetition_penalty": 1.75, "no_repeat_ngram_size": 3}
    (folder / "config.json").write_text(json.dumps(config))


def strip(folder: Path, step: str) -> None:
    """Take away what has won so far."""
    right = json.loads((folder / "right.json").read_text())
    named = (folder / "chat_template.json").is_file()
    if step == "no nested settings":
        own = {**right["settings"], "image_mean": [0.4, 0.3, 0.2], "resample": 0}
        edit(folder / PROCESSOR, image_processor=..., chat_template=..., processor_class=...)
        edit(folder / IMAGES, **own, processor_class=right["owner"])
        edit(folder / TOKENIZER, image_std=...)
    elif step == "no template.json":
        if named:
            (folder / "chat_template.json").unlink()
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
        edit(folder / IMAGES, processor_class=...)
        edit(folder / TOKENIZER, processor_class=right["owner"])
        (folder / "generation_config.json").unlink()
    elif step == "no processor file":
        edit(folder / TOKENIZER, processor_class=...)
        edit(folder / IMAGES, image_processor_type=..., feature_extractor_type=_old_name(right["settings"]))
        config = json.loads((folder / "config.json").read_text())
        del config["repetition_penalty"], config["eos_token_id"]
        (folder / "config.json").write_text(json.dumps(config))
    elif step == "no template files" and (folder / "additional_chat_templates").is_dir():
        (folder / "additional_chat_templates" / "tool_use.jinja").unlink()
        (folder / "chat_template.jinja").unlink()


def _old_name(settings: dict[str, Any]) -> str:
    return settings["image_processor_type"].replace("ImageProcessor", "FeatureExtractor")
