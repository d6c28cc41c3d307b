"""A processor's tensors as prompts and pictures: where a bundle's shapes fit them, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vtp.engines.errors import UsageError
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.generation.logits_rules import written_out
from vtp.runtime.media.given import ReadyPictures, as_array
from vtp.runtime.media.pictures import NO_PICTURE, NoPicture
from vtp.runtime.prompt.prompter import Prompt

# What processors give beside input_ids; IMPLIED say again what the ids say, or are for training.
TENSORS = ("attention_mask", "pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
IMPLIED = ("token_type_ids", "mm_token_type_ids", "labels")


def read_rows(
    manifest: Manifest, input_ids: Any, tensors: dict[str, Any]
) -> list[tuple[Prompt, ReadyPictures | NoPicture]]:
    """The prompt and the pictures of each row of a batch; UsageError for what this bundle cannot take.

    input_ids  integers [B,S], in which every visual token has a place, as processors expand them
    tensors    by the names of `TENSORS`; None where the processor gave none
    """
    ids = _whole("input_ids", input_ids)
    if as_array("input_ids", input_ids).dtype.itemsize < 4:
        raise UsageError("input_ids are of fewer than 32 bits, too few for every id; give int32 or int64")
    mask = tensors.get("attention_mask")
    kept = np.ones_like(ids) if mask is None else _whole("attention_mask", mask)
    if kept.shape != ids.shape:
        raise UsageError(f"attention_mask has the shape {list(kept.shape)}, and input_ids {list(ids.shape)}")
    if len(masked := np.flatnonzero(~kept.any(axis=1))):
        raise UsageError(f"attention_mask leaves no token of row {masked[0]}; every row needs a prompt")
    prompts = [_prompt(row[own != 0].tolist(), manifest) for row, own in zip(ids, kept, strict=True)]
    counts = [len(prompt.image_starts) for prompt in prompts]
    pictures = _pictures(sum(counts), manifest, tensors)
    rows = []
    for prompt, count in zip(prompts, counts, strict=True):
        own, pictures = pictures[:count], pictures[count:]
        rows.append((prompt, ReadyPictures(own) if own else NO_PICTURE))
    return rows


def _whole(name: str, value: Any) -> np.ndarray:
    """An array of integers [B,S], none of them negative or of more than 32 bits."""
    array = as_array(name, value)
    if array.ndim != 2 or array.dtype.kind not in "iub" or not array.size:
        raise UsageError(f"{name} is {array.dtype}{list(array.shape)}; give integers [batch,sequence]")
    least, most = int(array.min()), int(array.max())
    if least < 0 or most >= 1 << 32:
        odd = least if least < 0 else most
        raise UsageError(f"{name} holds {odd}; every id and mark is 0 or more, and below 2 ** 32")
    return array.astype(np.int64)


def _prompt(ids: list[int], manifest: Manifest) -> Prompt:
    """A row's ids as the bundle's prompts have them: one image token for each run of visual tokens."""
    image, block = manifest.text.image_token_id, list(manifest.text.placeholder_ids)
    first, runs = block.index(image), manifest.runs
    written = written_out(block, image, runs)
    short: list[int] = []
    starts: list[int] = []
    place = 0
    while image in ids[place:]:
        begin = ids.index(image, place) - first
        if begin < place or ids[begin : begin + len(written)] != written:
            raise UsageError(_unlike(ids, begin + first, manifest))
        short += ids[place:begin]
        starts.append(len(short) + first)
        short += block
        place = begin + len(written)
    short += ids[place:]
    return Prompt("", short, tuple(starts), len(short) - len(starts) * len(runs))


def _unlike(ids: Sequence[int], at: int, manifest: Manifest) -> str:
    """Why a picture's place in the ids is not one of this bundle's."""
    image = manifest.text.image_token_id
    each = " and ".join(map(str, sorted(set(manifest.runs))))
    found = next((place for place, token in enumerate(ids[at:]) if token != image), len(ids) - at)
    return (
        f"input_ids have {list(ids).count(image)} image tokens, {found} in a row from {at} on; this bundle "
        f"has {manifest.visual.count} for each picture, {each} in a row: {_cure(manifest)}"
    )


def _pictures(count: int, manifest: Manifest, tensors: dict[str, Any]) -> list[np.ndarray]:
    """pixel_values of each picture, in the shape in which the bundle's own preprocessing gives them."""
    pixels, spec = tensors.get("pixel_values"), manifest.image
    if (pixels is None) != (count == 0):
        has = "are given" if count == 0 else "are missing"
        raise UsageError(f"pixel_values {has}, and input_ids have places for {count} pictures")
    if pixels is None:
        return []
    array, shape = as_array("pixel_values", pixels), spec.shape
    if array.dtype.kind != "f":
        raise UsageError(
            f"pixel_values are {array.dtype}; give the processor's own, which are floating point"
        )
    alike = array.shape[1 - len(shape) :] == tuple(shape[1:])
    if not alike or array.size != count * int(np.prod(shape)):
        raise UsageError(
            f"pixel_values have the shape {list(array.shape)}; this bundle takes {list(shape)} for each of "
            f"{count} pictures: {_cure(manifest)}"
        )
    _check_sizes(manifest, tensors)
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise UsageError("pixel_values hold values that are not finite in float32; what made them overflowed")
    return list(array.reshape(count, *shape))


def _check_sizes(manifest: Manifest, tensors: dict[str, Any]) -> None:
    """Hold what the processor says of sizes against the one size of the bundle."""
    spec = manifest.image
    size = spec.image_size
    if (sizes := tensors.get("image_sizes")) is not None and size is not None:
        found = _in_groups("image_sizes", sizes, 2)
        if (found != np.array(size)).any():
            raise UsageError(f"image_sizes has {found.tolist()} (height, width): {_cure(manifest)}")
    if (grids := tensors.get("image_grid_thw")) is not None:
        patch = getattr(spec, "patch_size", None)
        if size is None or patch is None:
            raise UsageError(
                "image_grid_thw belongs to Qwen-VL's processors, and this bundle is of another family"
            )
        wanted = [1, size[0] // patch, size[1] // patch]
        found = _in_groups("image_grid_thw", grids, 3)
        if (found != np.array(wanted)).any():
            raise UsageError(
                f"image_grid_thw has {found.tolist()}, and this bundle is for {wanted}: {_cure(manifest)}"
            )
    mask = tensors.get("pixel_attention_mask")
    if mask is not None and not as_array("pixel_attention_mask", mask).all():
        raise UsageError(
            f"pixel_attention_mask leaves pixels out, which this bundle does not: {_cure(manifest)}"
        )


def _in_groups(name: str, value: Any, width: int) -> np.ndarray:
    """Numbers [pictures,width]."""
    array = as_array(name, value)
    if array.size % width:
        raise UsageError(f"{name} has the shape {list(array.shape)}; give [pictures, {width}]")
    return array.reshape(-1, width)


def _cure(manifest: Manifest) -> str:
    size = manifest.image.image_size
    if size is None:
        return "use the processor of the model that it was exported from"
    return (
        f"it was made for pictures of {size[1]}x{size[0]}; resize them so before the processor, have the "
        "processor keep that size, or export with another --image-size"
    )
