"""Whether OpenVINO's int8 products are exact on this processor, and what to ask of it where they are not.

On x86 processors without VNNI its kernels add two products of uint8 and int8 in 16 bits, which saturate
there: sums are off by a sixth and more where codes are large. OpenVINO's own advice is to quantise weights to
seven bits, for every processor. Here such a processor computes int8 layers in float32 instead: the same
codes, at the speed and the memory of a float32 graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from vtp.engines.openvino.library import load_openvino

_IN_FLOAT = {"LP_TRANSFORMS_MODE": "NO"}  # of OpenVINO's CPU plugin, which does not list it
_QUIETLY = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
_ROWS, _WIDTH, _COLUMNS = 4, 256, 64
_CODE = 120  # of 127, of activations and of weights: its products of a pair are past 16 bits, as uint8's are


@lru_cache(maxsize=1)
def product_settings() -> dict[str, str]:
    """Settings of the CPU plugin under which products of int8 codes are exact; asked of it once a process."""
    return {} if _are_exact() else dict(_IN_FLOAT)


def _are_exact() -> bool:
    """Whether a layer of large codes gives the sums that whole numbers give."""
    openvino = load_openvino()
    compiled = openvino.Core().compile_model(_layer(openvino), "CPU", _QUIETLY)
    found = compiled(np.full((_ROWS, _WIDTH), _CODE, np.float32))[0]
    return bool(np.array_equal(found, np.full((_ROWS, _COLUMNS), float(_CODE * _CODE * _WIDTH))))


def _layer(openvino: Any) -> Any:
    """Activations in 255 codes from -127 to 127, weights of int8: a step of 1 on both sides."""
    ops = openvino.opset13
    rows = ops.parameter([_ROWS, _WIDTH], np.float32)
    low, high = (np.array(limit, np.float32) for limit in (-127, 127))
    codes = ops.fake_quantize(rows, low, high, low, high, levels=255)
    weight = ops.convert(ops.constant(np.full((_WIDTH, _COLUMNS), _CODE, np.int8)), np.float32)
    scaled = ops.multiply(weight, ops.constant(np.ones((1, _COLUMNS), np.float32)))
    return openvino.Model([ops.matmul(codes, scaled, False, False)], [rows])
