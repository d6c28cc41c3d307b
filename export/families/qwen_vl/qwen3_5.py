"""Qwen3.5: Qwen3-VL's tower without deepstack features, and a decoder most of whose layers do not attend.

Source: transformers' modeling_qwen3_5.py (gated delta networks: Yang et al., arXiv 2412.06464). Three of four
layers are linear attention: a short convolution, then a matrix for each head that keys and values are summed
up in. They carry the convolution's last inputs and that matrix, whatever the prompt's length.
"""

from __future__ import annotations

from typing import Any

import torch

from vtp.export.families.qwen_vl.qwen2_vl import Qwen2VL
from vtp.export.families.qwen_vl.qwen3_vl import Qwen3VL
from vtp.export.families.qwen_vl.reference import MergedReference
from vtp.export.graphs.attention.states import CONV, RECURRENT
from vtp.export.graphs.decoder import Decoder, LayerState

# What holds of every family with this decoder.
LIMITS = (
    "target ort on ONNX Runtime alone, which has an operator for linear attention; decoder methods read "
    "attention only in layers that have it; no prefix caching"
)


class Qwen3_5(Qwen3VL):
    """Qwen3_5ForConditionalGeneration."""

    name = "qwen3_5"
    architectures = ("Qwen3_5ForConditionalGeneration",)
    decoders = ("qwen3_5_text",)
    limits = f"{Qwen2VL.limits}; {LIMITS}"
    reference = MergedReference

    @property
    def decoder(self) -> Decoder:
        text = self.model.model.language_model
        return Decoder(text, self.model.lm_head, axes=3, states=delta_states(text.config))

    def _deep(self) -> dict[int, Any]:
        return {}  # it has none


def delta_states(config: Any) -> tuple[LayerState, ...]:
    """What the layers of linear attention carry, by a text_config."""
    layers = tuple(number for number, kind in enumerate(config.layer_types) if kind == "linear_attention")
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    matrix = (config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
    states = (
        LayerState(CONV, layers, (2 * keys + values, config.linear_conv_kernel_dim)),
        LayerState(RECURRENT, layers, matrix, torch.float32),
    )
    return states if layers else ()


FAMILY = Qwen3_5
