"""What vtp-calib quantize made of a bundle's parts, as its manifest says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtp.engines.errors import shown

_PARTS = ("vision", "decoder", "prompt")  # "prompt": what reads prompts, where that is another graph
_WORD = 20  # characters of what a stranger's manifest says


def bits_of(quantization: Mapping[str, Any]) -> dict[str, str]:
    """Part -> its bits, such as "int8" or "none", of a manifest's `quantization`; {} where it says none."""
    said = {part: quantization.get(part) for part in _PARTS}
    return {part: shown(bits, _WORD) for part, bits in said.items() if isinstance(bits, str)}
