"""The families: one file each, exposing `FAMILY`; found by the architecture name in config.json."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

from vtp.engines import VtpError
from vtp.export.families.base import Family

_SUFFIX = "ForConditionalGeneration"
# Architectures that were looked at and are not served: why, and what it would take.
UNSERVED = {
    "FastVlmForConditionalGeneration": (
        "its vision tower (FastViTHD) is a model of timm, which needs torchvision besides, and vtp's export "
        "installs neither; it would take both, and a family whose features are a convolution's map, without "
        "the scores that most methods read"
    ),
    "MiniCPMV4_7ForConditionalGeneration": (
        "its positions lie on a canvas of slices, those of the marks around them as well (Canvas M-RoPE); it "
        "would take a splice that numbers tokens and marks so"
    ),
    "Qwen3_5MoeForConditionalGeneration": (
        "its decoder routes every token to experts of its own; it would take graphs of routed experts"
    ),
}


def families() -> list[type[Family]]:
    """Every family, by name."""
    package = __name__.rpartition(".")[0]
    folder = str(Path(__file__).parent)
    modules = [import_module(item.name) for item in walk_packages([folder], f"{package}.")]
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return sorted(found, key=lambda family: str(family.name))


def find_family(config: dict[str, Any]) -> type[Family]:
    """The family of a config.json: by its `model_type`, as transformers chooses; else by `architectures`.

    `architectures` may be missing, null or a trainer's own where transformers knows the model_type.
    Raises VtpError naming the architecture and what is supported.
    """
    named = config.get("architectures") or []
    architectures = [str(name) for name in named] if isinstance(named, list) else [str(named)]
    known = {name: family for family in families() if family.takes(config) for name in family.architectures}
    model_class = _class_of(config.get("model_type"))
    for name in [model_class] if model_class else architectures:
        if name in known:
            return known[name]
    for asked in [model_class or "", *architectures]:
        if asked in UNSERVED:
            raise VtpError(f"{asked} is not supported: {UNSERVED[asked]}")
    given = ", ".join(architectures)[:200] or "none"
    silent = architectures and not known.keys() & set(architectures)  # they say what the model is
    kind = "" if silent else f" (model_type {config.get('model_type')!r:.80})"
    short = ", ".join(name.removesuffix(_SUFFIX) for name in sorted(known))
    raise VtpError(f"unsupported architecture {given}{kind}; supported, each with {_SUFFIX} behind: {short}")


def _class_of(model_type: Any) -> str | None:
    """The class that transformers' AutoModelForImageTextToText would load for a model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    return NAMES.get(model_type) if isinstance(model_type, str) else None
