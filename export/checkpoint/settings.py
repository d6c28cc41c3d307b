"""What a model folder says beside its weights: image processor, chat template, special tokens, generation.

A folder often says a thing twice, and transformers has an order of its own, file by file and key by key. So
its own readers are asked, and never the files: what `AutoProcessor`, `AutoImageProcessor` and `AutoTokenizer`
would act on is what a bundle is made from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, AutoImageProcessor
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.models.auto.video_processing_auto import (
    VIDEO_PROCESSOR_MAPPING_NAMES,
    video_processor_class_from_name,
)
from transformers.processing_utils import ImagesKwargs, ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

from vtp.engines import VtpError
from vtp.export.checkpoint.processors import names_without_class, spec_from_processor
from vtp.export.families.base import Family
from vtp.runtime.prompt.prompter import TextSpec

T = TypeVar("T")
PROCESSOR, IMAGES = "processor_config.json", "preprocessor_config.json"
VIDEOS, TOKENIZER = "video_preprocessor_config.json", "tokenizer_config.json"
_FILES = (PROCESSOR, IMAGES, VIDEOS, TOKENIZER, "chat_template.json", "generation_config.json")


def check_files(folder: Path, read: Callable[[Path, str], dict[str, Any]]) -> None:
    """Refuse what transformers would stumble over, or would load from elsewhere.

    read  gives a file's JSON object, or raises VtpError
    """
    found = {name: read(folder / name, "") for name in _FILES if (folder / name).is_file()}
    if "audio_tokenizer" in found.get(PROCESSOR, {}) or (folder / "audio_tokenizer_config.json").is_file():
        raise VtpError(
            f"{folder} names an audio tokenizer, a model of its own; vtp serves pictures and videos"
        )


# -- pictures and videos -------------------------------------------------------------------------------------


def processor_settings(folder: Path, media: str, tokenizer: Any) -> dict[str, Any]:
    """Settings by which transformers' processor of this folder turns pictures (or frames) into pixels.

    These are, from the weakest to the strongest: the defaults of the image processor's class; the folder's
    settings for it; what the processor's class asks of it; keys of tokenizer_config.json that bear the name
    of an image setting. `image_processor_type` (or `video_processor_type`) names the class.

    Raises VtpError where transformers cannot read the folder.
    """
    owner = _processor_class(folder)
    own, names = _video_settings(folder) if media == "video" else _image_settings(folder)
    # A setting that an image processor has no value for, such as do_pad of a batch, is none of its own.
    pixtral = getattr(owner, "__name__", "") == "PixtralProcessor"  # which torchvision's absence hides
    asked = _whole_tokens(folder) if pixtral else _class_settings(owner, media)
    asked = {key: value for key, value in asked.items() if own.get(key) is not None}
    asked |= _from_tokenizer(tokenizer, names)
    return {**own, **{key: value for key, value in asked.items() if value is not None}}


def _image_settings(folder: Path) -> tuple[dict[str, Any], set[str]]:
    """Settings of the folder's image processor, class defaults among them; names that its class knows."""
    given, _ = _ask(folder, "image processor", ImageProcessingMixin.get_image_processor_dict, str(folder))
    if names := names_without_class(given):
        return {key: given[key] for key in given if key in {*names, "image_processor_type"}}, names
    try:
        processor = _ask(
            folder,
            "image processor",
            AutoImageProcessor.from_pretrained,
            folder,
            backend="pil",
            local_files_only=True,
            trust_remote_code=False,
        )
    except VtpError:
        if given.get("image_processor_type"):
            spec_from_processor(given)  # says of a class that is unknown which ones are known
        raise
    names = {*ImagesKwargs.__annotations__, *processor.valid_kwargs.__annotations__}
    settings = processor.to_dict()
    return {key: settings[key] for key in settings if key in {*names, "image_processor_type"}}, names


def _video_settings(folder: Path) -> tuple[dict[str, Any], set[str]]:
    """Settings of the folder's video processor, whose classes exist with torchvision alone; no names.

    Which class it is goes by `AutoVideoProcessor`'s rules.
    """
    given, _ = _ask(folder, "video processor", BaseVideoProcessor.get_video_processor_dict, str(folder))
    settings = dict(given)
    old = settings.pop("image_processor_type", None)
    if settings.get("video_processor_type") is None:
        name = str(old).replace("ImageProcessor", "VideoProcessor")
        if old is None or video_processor_class_from_name(name) is None:
            mapped = VIDEO_PROCESSOR_MAPPING_NAMES.get(_config(folder).model_type)
            name = str(mapped.get("torchvision") if isinstance(mapped, Mapping) else mapped)
        settings["video_processor_type"] = name
    return settings, set()


def _processor_class(folder: Path) -> Any:
    """AutoProcessor's class for the folder: of the files that name one the first, else the model's."""
    for settings in _naming_files(folder):
        if settings.get("processor_class") is not None:
            named = processor_class_from_name(str(settings["processor_class"]))
            if named is not None:
                return named
            break
    model = _config(folder)
    named = processor_class_from_name(str(getattr(model, "processor_class", None)))
    return named or PROCESSOR_MAPPING.get(type(model), None)


def _naming_files(folder: Path) -> Iterator[Mapping[str, Any]]:
    """What AutoProcessor looks for a processor class in, in its order."""
    if (folder / PROCESSOR).is_file():
        yield _ask(folder, "processor", ProcessorMixin.get_processor_dict, str(folder))[0]
    if (folder / IMAGES).is_file():
        yield _ask(folder, "image processor", ImageProcessingMixin.get_image_processor_dict, str(folder))[0]
    elif (folder / VIDEOS).is_file():
        yield _ask(folder, "video processor", BaseVideoProcessor.get_video_processor_dict, str(folder))[0]
    if (folder / TOKENIZER).is_file():
        yield json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))


def _class_settings(owner: Any, media: str) -> dict[str, Any]:
    """What a processor class asks of its image (or video) processor at every call."""
    name = f"{media}s_kwargs"
    defaults = getattr(getattr(owner, "valid_processor_kwargs", None), "_defaults", {})
    return {**(getattr(owner, name, None) or {}), **defaults.get(name, {})}


def _whole_tokens(folder: Path) -> dict[str, Any]:
    """What PixtralProcessor asks of its image processor: whole tokens, by its own settings."""
    own, _ = _ask(folder, "processor", ProcessorMixin.get_processor_dict, str(folder))
    patch, edge = own.get("patch_size", 16), own.get("spatial_merge_size", 1)
    if not (type(patch) is int and type(edge) is int):
        raise VtpError(f"patch_size and spatial_merge_size of {folder / PROCESSOR} are not whole numbers")
    return {"patch_size": patch * edge}


def _from_tokenizer(tokenizer: Any, names: set[str]) -> dict[str, Any]:
    """Arguments of the tokenizer that bear the name of an image setting: processors hand them on."""
    return {
        name: getattr(tokenizer, name, tokenizer.init_kwargs[name])
        for name in names
        if name in tokenizer.init_kwargs
    }


def _config(folder: Path) -> Any:
    return _ask(
        folder, "config", AutoConfig.from_pretrained, folder, local_files_only=True, trust_remote_code=False
    )


# -- words ---------------------------------------------------------------------------------------------------


def read_text(folder: Path, tokenizer: Any, family: Family, eos_ids: tuple[int, ...]) -> TextSpec:
    """What the model expects of its prompt. Raises VtpError for templates that transformers refuses."""
    special = {
        name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)
    }
    processor, _ = _ask(folder, "processor", ProcessorMixin.get_processor_dict, str(folder))
    mark, text = family.image_text(tokenizer.convert_ids_to_tokens)
    return TextSpec(
        chat_template=family.template or _chat_template(folder, processor, tokenizer),
        image_token=_image_token(processor, tokenizer, family),
        image_token_id=family.image_token_id,
        placeholder_ids=tuple(family.placeholder_ids),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=eos_ids,
        special_tokens=special,
        image_mark=mark,
        image_text=text,
        media=family.media,
    )


def _chat_template(folder: Path, processor: Mapping[str, Any], tokenizer: Any) -> str | None:
    """The processor's template, else the tokenizer's; of several that have names the one called `default`."""
    template = processor.get("chat_template")
    if template is None:
        template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            named = ", ".join(sorted(map(str, template)))
            raise VtpError(f"{folder} has several chat templates ({named}) and none is called 'default'")
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise VtpError(f"the chat template of {folder} is {template!r:.60}, not text")
    return template


def _image_token(processor: Mapping[str, Any], tokenizer: Any, family: Family) -> str:
    """The text of the image token: the tokenizer's or processor's own word for it, else the config's id.

    Of a family that answers about videos, the video token's. The prompter refuses it if its id is not the
    config's.
    """
    name = f"{family.media}_token"
    own = getattr(tokenizer, f"context_{name}", None) or getattr(tokenizer, name, None)
    named = processor.get(name)
    token = own or (named if isinstance(named, str) else None)
    return str(token or tokenizer.convert_ids_to_tokens(family.image_token_id))


def _ask(folder: Path, what: str, reader: Callable[..., T], *args: Any, **options: Any) -> T:
    """What one of transformers' readers says; VtpError in one line where it fails."""
    try:
        return reader(*args, **options)
    except Exception as error:  # transformers raises many kinds here, all about this folder
        reason = " ".join(str(error).split())[:240]
        raise VtpError(f"cannot load the {what} in {folder}: {type(error).__name__}: {reason}") from error
