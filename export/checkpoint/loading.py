"""A Hugging Face model folder: what it is, and its parts loaded by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint import settings
from vtp.export.checkpoint.added_tokens import check_added_tokens
from vtp.export.checkpoint.config_limits import check_numbers, check_size
from vtp.export.checkpoint.generation import Generation, read_generation
from vtp.export.checkpoint.hub import model_name, resolve
from vtp.export.checkpoint.model_folder import check_folder, read_json
from vtp.export.checkpoint.processors import spec_from_processor, unasked_tiles
from vtp.export.checkpoint.unsupported import refuse_unsupported
from vtp.export.checkpoint.weights import Weights, shapes_of
from vtp.export.families import families, find_family
from vtp.export.families.base import Family
from vtp.export.towers import TowerReduction
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.clip import ClipSpec
from vtp.runtime.prompt.prompter import TextSpec

__all__ = ["DTYPES", "Checkpoint", "about", "check", "load", "model_name", "read_config", "resolve"]

DTYPES = {"float32": torch.float32, "float16": torch.float16}
_LARGEST_ID = 2**24  # vocabularies have some 10**5 tokens
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A model and the facts that a bundle's manifest repeats. Its weights stay on the disk: see `weights`."""

    folder: Path
    name: str
    family: Family
    image: ImageSpec
    text: TextSpec
    tokenizer_json: str
    max_positions: int
    generation: Generation
    notes: tuple[str, ...] = ()  # lines for anyone who exports


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises VtpError where it is missing or not JSON."""
    return _read_json(folder / "config.json", f"{folder} is not a model folder: it has no config.json")


def check(folder: Path, frames: int | None = None, tower: TowerReduction | None = None) -> type[Family]:
    """The family that serves the model in `folder`, found without loading the model.

    frames  of the videos that it is to answer about; None: pictures
    tower   what its vision tower is to do with fewer rows

    Raises VtpError for an unsupported architecture and for missing files, UsageError for a family without
    videos or without that reduction.
    """
    with about(folder):
        family = _check(folder, frames)
    if tower is not None:
        family.check_reduction(tower.name)
    return family


def _check(folder: Path, frames: int | None) -> type[Family]:
    check_folder(folder)
    config = read_config(folder)
    refuse_unsupported(folder, config)
    family = find_family(config)
    check_numbers(folder / "config.json", config, shapes_of(folder))
    family.check(config)
    if frames is not None:
        family = _of_clips(family)
    for names, what in ((_TOKENIZERS, "tokenizer"), (_PROCESSORS, "image processor")):
        if not any((folder / name).is_file() for name in names):
            raise VtpError(f"{folder} has no {what}: one of {', '.join(names)} is needed beside the weights")
    return family


def _of_clips(family: type[Family]) -> type[Family]:
    if family.clips is None:
        others = ", ".join(one.name for one in families() if one.clips)
        raise UsageError(
            f"family {family.name} serves pictures, not videos: leave out --frames; families with videos: "
            f"{others}"
        )
    return family.clips


def load(
    folder: Path,
    dtype: str,
    image_size: tuple[int, int] | None = None,
    fit: str | None = None,
    frames: int | None = None,
    tower: TowerReduction | None = None,
) -> Checkpoint:
    """Build a model with transformers in `dtype` and gather what the bundle needs from its folder.

    The weights stay on the disk: the model has stand-ins for them (see `vtp.export.checkpoint.weights`).

    image_size  (height, width) that the bundle is made for, and `fit`, what becomes of pictures that the
                processor would lay out otherwise: see `spec_from_processor`.
    frames      of the videos that it answers about; None: pictures.
    tower       a reduction of its vision tower, if any

    Raises VtpError for what `check` refuses, and for weights that do not fit the config; UsageError for an
    image size that the processor does not give, and for a reduction that does not fit the tower.
    """
    with about(folder):
        return _load(folder, dtype, image_size, fit, frames, tower)


def _load(
    folder: Path,
    dtype: str,
    image_size: tuple[int, int] | None,
    fit: str | None,
    frames: int | None,
    tower: TowerReduction | None,
) -> Checkpoint:
    """Check the folder before the weights, build the model, and fit its image processor to its tower."""
    family_class = _check(folder, frames)
    settings.check_files(folder, _read_json)
    check_added_tokens(folder)
    tokenizer = _load_tokenizer(folder)
    asked = settings.processor_settings(folder, family_class.media, tokenizer)
    image = spec_from_processor(asked, image_size, fit)
    if image.kind not in family_class.image_kinds:
        raise VtpError(
            f"the image processor cuts pictures as kind '{image.kind}', family {family_class.name} takes "
            f"{', '.join(family_class.image_kinds)}; fix the image processor's settings"
        )
    if isinstance(image, ClipSpec):
        image = replace(image, frames=frames)
    family = family_class(_load_model(folder, family_class.architectures[0], DTYPES[dtype]))
    image = image if tower is None else family.reduce(tower, image)
    family.prepare(image)
    if image.fixed_size != family.image_size:
        raise VtpError(
            f"the image processor makes {image.fixed_size} pixels, the vision tower takes "
            f"{family.image_size}; fix the image processor's settings"
        )
    family.read_marks(tokenizer)
    generation = read_generation(folder, tokenizer, family.decoder.model.config.vocab_size)
    return Checkpoint(
        folder=folder,
        name=model_name(folder),
        family=family,
        image=image,
        text=settings.read_text(folder, tokenizer, family, generation.eos_ids),
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        max_positions=int(getattr(family.decoder.model.config, "max_position_embeddings", 2048)),
        generation=generation,
        notes=(*generation.notes, *([] if image_size else unasked_tiles(asked, image))),
    )


@contextmanager
def about(folder: Path) -> Iterator[None]:
    """Turn whatever fails while a model folder is read into one line about that folder."""
    try:
        yield
    except (VtpError, MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:  # transformers raises many kinds here, all about this folder
        raise VtpError(f"cannot load the model in {folder}: {_one_line(error)}") from error


def _load_model(folder: Path, architecture: str, dtype: torch.dtype) -> Any:
    """The model in eval mode, with stand-ins for its weights."""
    import transformers

    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise VtpError(
            f"transformers {transformers.__version__} has no class {architecture}; update transformers"
        )
    weights = Weights(folder, dtype)
    config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    check_size(folder, model_class, config, weights.shapes)
    model = _build(folder, model_class, config, dtype, weights.state())
    converted = weights.converted(model)
    if converted:  # weights that transformers joins or splits are joined and split for real
        model = _build(folder, model_class, config, dtype, weights.state(converted))
    model.vtp_weights = weights  # so that what the stand-ins stand for lives as long as the model
    return model.eval()


def _build(folder: Path, model_class: Any, config: Any, dtype: torch.dtype, state: dict[str, Tensor]) -> Any:
    """from_pretrained on a state dict. Raises VtpError when the checkpoint and its config do not agree."""
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, with the tensor's name
    )
    if info["missing_keys"]:
        raise VtpError(f"the checkpoint in {folder} lacks the tensor {min(map(str, info['missing_keys']))}")
    if info["mismatched_keys"]:
        name, given, wanted = min(info["mismatched_keys"])
        raise VtpError(
            f"the checkpoint in {folder} has {name} as {list(given)}; its config says {list(wanted)}"
        )
    if info["unexpected_keys"]:
        extra = sorted(map(str, info["unexpected_keys"]))[0]
        raise VtpError(f"the checkpoint in {folder} has a tensor that its config has no place for: {extra}")
    return model


def _load_tokenizer(folder: Path) -> Any:
    """The tokenizer alone: a whole processor may want torchvision, for videos that nobody asked about."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_ids(folder, tokenizer.get_vocab())
        tokenizer.backend_tokenizer.to_str()
        return tokenizer
    except VtpError:
        raise
    except Exception as error:  # as above
        raise VtpError(f"cannot load the tokenizer in {folder}: {_one_line(error)}") from error


def _check_ids(folder: Path, vocabulary: Mapping[str, int]) -> None:
    """Refuse ids that no embedding table has: the library notes each id that lies between them in memory."""
    largest = max(vocabulary.values(), default=0)
    if largest > _LARGEST_ID:
        raise VtpError(
            f"cannot load the tokenizer in {folder}: it gives id {largest} (limit: {_LARGEST_ID}); "
            "correct its tokenizer.json"
        )


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.exists():
        raise VtpError(missing)
    return read_json(path)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
