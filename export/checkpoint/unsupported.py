"""What a checkpoint may say that changes what `from_pretrained` loads, and that a bundle cannot hold.

Each is refused in one line that names it: a bundle that left it out would answer otherwise than the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vtp.engines import VtpError
from vtp.export.checkpoint.model_folder import plain_name, read_json

# Keys under which config.json, or a part of it, says how its weights were quantised; the last is MLX's.
_QUANTIZED = ("quantization_config", "compression_config", "quantization")
# The same in files beside the weights: AutoGPTQ's, AutoAWQ's and ModelOpt's -> their default method.
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_BITS = ("bits", "w_bit", "wbits", "num_bits", "weight_bits", "nbits")
_METHOD = ("quant_method", "quant_algo", "quant_type", "method")
# Keys of config.json with which transformers builds another model than the class's own.
_REBUILT = ("fusion_config", "per_layer_config")
_PATHS = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "gguf_file", "normalizer_file")


def refuse_unsupported(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise VtpError for what lies in a model folder or its config.json and would get lost in a bundle."""
    for place, part in parts(config):
        _refuse_quantized(folder, place, part)
        for key in _REBUILT:
            if part.get(key) is not None and not _known_layers(part, key):
                raise VtpError(
                    f"{folder / 'config.json'} sets {place}{key}, with which transformers builds other "
                    "layers; that is not supported"
                )
    for name, method in _BESIDE.items():
        if (folder / name).is_file():
            _refuse_beside(folder / name, method)
    if (folder / "adapter_config.json").exists():
        raise VtpError(
            f"{folder} holds an adapter (adapter_config.json); merge it into its model first, with PEFT's "
            "merge_and_unload and save_pretrained"
        )
    if config.get("configuration_files") is not None:
        raise VtpError(
            f"{folder / 'config.json'} sets configuration_files; only config.json itself is read: remove "
            "that key"
        )
    _refuse_paths(folder)


def _known_layers(part: Mapping[str, Any], key: str) -> bool:
    """Whether what is said of single layers is of Gemma 4, whose family reads it from the model."""
    own = part[key]
    if key != "per_layer_config" or part.get("model_type") != "gemma4_text" or not isinstance(own, Mapping):
        return False
    known = {"head_dim", "num_key_value_heads"}
    return all(isinstance(layer, Mapping) and set(layer) <= known for layer in own.values())


def parts(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A config and the configs in it, each with what stands before its keys: "" or "text_config."."""
    yield place, config
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from parts(value, f"{place}{key}.")


def _refuse_quantized(folder: Path, place: str, part: Mapping[str, Any]) -> None:
    for key in _QUANTIZED:
        found = part.get(key)
        if found is not None and (key != "quantization" or isinstance(found, Mapping)):
            method = "mlx" if key == "quantization" else "unknown method"
            raise VtpError(
                f"the weights in {folder} are quantised ({_told(found, method)}: {place}{key} of "
                "config.json); only float weights can be exported: give the original model, and see "
                "vtp-calib quantize"
            )


def _refuse_beside(path: Path, method: str) -> None:
    found = read_json(path)
    inner = found.get("quantization", found)
    if isinstance(inner, Mapping) and any(inner.get(key) for key in (*_METHOD, *_BITS)):
        raise VtpError(
            f"the weights in {path.parent} are quantised ({_told(inner, method)}: {path.name}); only float "
            "weights can be exported: give the original model, and see vtp-calib quantize"
        )


def _told(found: Any, method: str) -> str:
    """Method and bits of a quantisation config, as far as it says them: "gptq, 4 bits"."""
    if not isinstance(found, Mapping):
        return method
    named = next((found[key] for key in _METHOD if isinstance(found.get(key), str)), None)
    loaded = next((bits for bits in (4, 8) if found.get(f"load_in_{bits}bit") is True), None)
    if named is None and (loaded or "bnb_4bit_quant_type" in found):
        named = "bitsandbytes"
    bits = loaded or next(_find_bits(found), None)
    return f"{str(named or method)[:40]}, {bits} bits" if bits else str(named or method)[:40]


def _find_bits(found: Mapping[str, Any]) -> Iterator[int]:
    for _, part in parts(found):
        yield from (part[key] for key in _BITS if type(part.get(key)) is int)


def _refuse_paths(folder: Path) -> None:
    """Refuse tokenizer settings that make transformers open files that were not looked at."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    if config.get("init_inputs"):
        raise VtpError(f"{path} sets init_inputs; that is not supported: remove that key")
    named = [(key, config[key]) for key in _PATHS if config.get(key) is not None]
    versions = config.get("fast_tokenizer_files") or []
    if not isinstance(versions, list):
        raise VtpError(f"fast_tokenizer_files of {path} is not a list of file names")
    for key, name in [*named, *(("fast_tokenizer_files", name) for name in versions)]:
        if not plain_name(name):
            raise VtpError(
                f"{path} names {str(name)[:120]!r} as {key}; only files of the same folder are read: "
                "remove that key"
            )
