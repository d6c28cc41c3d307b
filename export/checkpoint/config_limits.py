"""Numbers of a config.json, bounded by the weights that lie beside it before a model is built from them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vtp.engines import VtpError
from vtp.export.checkpoint.unsupported import parts

# Each layer has tensors of its own, so there are fewer layers than tensors.
_LAYERS = re.compile(r"(?:.*_)?(?:layers?|depths?)")
_LAYER_COUNTS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "n_layer")
# Each of these is an axis of a tensor, or a part of one.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
    "head_dim",
    "embed_dim",
    "out_hidden_size",
    "projection_dim",
    "num_channels",
    "in_channels",
    "in_chans",
    "patch_size",
    "image_size",
    "spatial_patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "num_position_embeddings",
    "mm_tokens_per_image",
    "scale_factor",
    "num_labels",
)
_FREE = ("max_position_embeddings", "image_seq_length")  # no weight tells them
_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_ROOM = 1 << 20  # what a size may be without a tensor that shows it: defaults that the model has no use for
_PATCHES = 1 << 16  # the same for how many patches a picture has
_FEW = 256
_WHOLE = 2**31 - 1
_PINPOINTS = 4096  # resolutions that a picture may be cut to
_EDGE = 1 << 16  # pixels


def check_numbers(path: Path, config: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse numbers in a config.json with which building the model would never end, or make no sense.

    path    of the config.json, for messages
    shapes  of all tensors in the checkpoint

    Raises VtpError, naming the key, what it is and what the weights allow.
    """
    tensors = len(shapes)
    longest = max((axis for shape in shapes for axis in shape), default=1)
    for place, part in parts(config):
        for key, value in part.items():
            said = f"{place}{key} of {path}"
            _check_value(said, value)
            _check_part(said, key, value)
            if key in _LAYER_COUNTS:
                _check_whole(said, value, tensors, f"the weights hold {tensors} tensors")
            elif _LAYERS.fullmatch(key) and type(value) is int and value > max(tensors, _FEW):
                raise VtpError(f"{said} is {_short(value)}; the weights hold {tensors} tensors")
            elif key in _SIZES:
                bound = max(longest, _ROOM)
                for number in value if isinstance(value, list) else [value]:
                    _check_whole(said, number, bound, f"the longest axis of a tensor is {longest}")
            elif key in _FREE:
                _check_whole(said, value, _WHOLE, "that is more than 32 bits hold")
            elif key in _TOKENS:
                _check_whole(said, value, _WHOLE, "that is more than 32 bits hold", least=0)
        _check_patches(path, place, part, longest)
        _check_pinpoints(f"{place}image_grid_pinpoints of {path}", part.get("image_grid_pinpoints"))


def check_size(folder: Path, model_class: Any, config: Any, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse a config whose model has far more numbers than the checkpoint, before one of them is stored.

    Raises VtpError with both counts. Tied weights may be counted twice.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # as it is loaded: what config.json names may not be installed
    with torch.device("meta"):
        model = model_class(config)
    wanted = sum(tensor.numel() for tensor in model.parameters())
    given = sum(math.prod(shape) for shape in shapes)
    if wanted > 2 * given + _ROOM:
        raise VtpError(
            f"config.json in {folder} describes a model of {wanted} weights; the checkpoint holds {given}"
        )


def _check_value(said: str, value: Any) -> None:
    for number in _leaves(value):
        if isinstance(number, float) and not math.isfinite(number):
            raise VtpError(f"{said} is {number}; a finite number is needed")
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            raise VtpError(f"{said} is {_short(number)}; that is more than 64 bits hold")


def _leaves(value: Any) -> Iterator[Any]:
    """The numbers of a value and the lists in it; objects are looked at as parts of their own."""
    if isinstance(value, list):
        for item in value:
            yield from _leaves(list(item.values()) if isinstance(item, dict) else item)
    else:
        yield value


def _check_part(said: str, key: str, value: Any) -> None:
    if (key.endswith("_config") or key == "rope_parameters") and not isinstance(value, Mapping | None):
        raise VtpError(f"{said} is {_short(value)}; a JSON object is needed")
    if key == "downsample_ratio" and not (isinstance(value, int | float) and 0 < value <= 1):
        raise VtpError(f"{said} is {_short(value)}; a number above 0, up to 1, is needed")
    if key == "model_type" and not isinstance(value, str | None):
        raise VtpError(f"{said} is {_short(value)}; a name is needed")


def _check_whole(said: str, value: Any, most: int, reason: str, least: int = 1) -> None:
    if value is None:  # the default of transformers' own class
        return
    if type(value) is not int or value < least:
        raise VtpError(f"{said} is {_short(value)}; a whole number from {least} is needed")
    if value > most:
        raise VtpError(f"{said} is {_short(value)}, but {reason}")


def _check_patches(path: Path, place: str, part: Mapping[str, Any], longest: int) -> None:
    """Towers make tables and grids of all patches, whose number is that of a table in the weights."""
    image, patch = _edges(part.get("image_size")), _edges(part.get("patch_size"))
    if not image or not patch:
        return
    count = math.prod(size // patch[min(number, len(patch) - 1)] for number, size in enumerate(image))
    if not 1 <= count <= max(longest, _PATCHES):
        raise VtpError(
            f"{place}image_size of {path} is {_short(part['image_size'])}: with patches of "
            f"{_short(part['patch_size'])} that makes {count}, but the longest axis of a tensor is {longest}"
        )


def _edges(value: Any) -> list[int]:
    if value is None:
        return []
    return value[:2] if isinstance(value, list) else [value, value]


def _check_pinpoints(said: str, value: Any) -> None:
    if value is None:
        return
    pairs = isinstance(value, list) and 0 < len(value) <= _PINPOINTS
    for pair in value if pairs else [None]:
        edges = pair if isinstance(pair, list) and len(pair) == 2 else [0]
        if not all(type(edge) is int and 1 <= edge <= _EDGE for edge in edges):
            raise VtpError(f"{said} is not a list of at most {_PINPOINTS} pairs of pixels from 1 to {_EDGE}")


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of over 40 digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
