"""The image encoder of a LLaVA as GGUF (an "mmproj" file): CLIP or SigLIP, and the projector `mlp`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.compare.llamacpp.checkpoint import PROJECTOR, TOWER, Checkpoint
from vtp.bench.compare.llamacpp.text_model import finish
from vtp.engines import VtpError

TOWERS = ("clip_vision_model", "siglip_vision_model")
# GGUF's name in a block -> transformers'.
_BLOCK = {
    "ln1": "layer_norm1",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_AROUND = {
    "v.patch_embd.weight": f"{TOWER}embeddings.patch_embedding.weight",
    "v.patch_embd.bias": f"{TOWER}embeddings.patch_embedding.bias",
    "v.class_embd": f"{TOWER}embeddings.class_embedding",
    "v.position_embd.weight": f"{TOWER}embeddings.position_embedding.weight",
    "v.pre_ln.weight": f"{TOWER}pre_layrnorm.weight",
    "v.pre_ln.bias": f"{TOWER}pre_layrnorm.bias",
    "mm.0.weight": f"{PROJECTOR}linear_1.weight",
    "mm.0.bias": f"{PROJECTOR}linear_1.bias",
    "mm.2.weight": f"{PROJECTOR}linear_2.weight",
    "mm.2.bias": f"{PROJECTOR}linear_2.bias",
}


def write_vision_model(checkpoint: Checkpoint, path: Path) -> None:
    """Write tower and projector in float32: the layers up to the one whose output the projector reads.

    Raises VtpError for a tower or a choice of features that llama.cpp's `mlp` does not have.
    """
    from gguf import GGUFWriter

    config = checkpoint.config
    layers = used_layers(config)
    writer = GGUFWriter(path, "clip")
    _add_sizes(writer, config, layers)
    _add_pixels(writer, checkpoint)
    for name, source in _sources(layers).items():
        if source in checkpoint:
            writer.add_tensor(name, np.ascontiguousarray(checkpoint.tensor(source)))
    finish(writer)


def used_layers(config: Any) -> int:
    """How many of the tower's layers make the features. VtpError for what the converter does not take."""
    vision, layer, chosen = (
        config.vision_config,
        config.vision_feature_layer,
        config.vision_feature_select_strategy,
    )
    with_class = vision.model_type == "clip_vision_model"
    if vision.model_type not in TOWERS or not isinstance(layer, int):
        raise VtpError(
            f"the GGUF converter takes one layer of {' or '.join(TOWERS)}, not {vision.model_type}"
        )
    if chosen != ("default" if with_class else "full") or config.projector_hidden_act != "gelu":
        raise VtpError("the GGUF converter takes patches alone, and a projector with gelu")
    if vision.hidden_size == vision.intermediate_size:
        raise VtpError(
            "llama.cpp tells the two matrices of an MLP apart by their widths, which are equal here"
        )
    used = range(vision.num_hidden_layers + 1)[layer]
    if used == 0:
        raise VtpError("the GGUF converter takes the output of a layer, not of the embeddings")
    if not with_class and used == vision.num_hidden_layers:
        raise VtpError("llama.cpp's SigLIP for this projector ends before the last norm")
    return used


def _add_sizes(writer: Any, config: Any, layers: int) -> None:
    vision = config.vision_config
    writer.add_file_type(0)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    # Without it llama.cpp leaves out one layer more.
    writer.add_array("clip.vision.feature_layer", [layers])
    _add_activation(writer, vision.hidden_act)


def _add_activation(writer: Any, name: str) -> None:
    """llama.cpp's gelu is the one by tanh; without a word it takes quick_gelu."""
    if name == "gelu_pytorch_tanh":
        writer.add_vision_use_gelu(True)
    elif name != "quick_gelu":
        raise VtpError(
            f"llama.cpp's CLIP has no activation '{name}'; it has quick_gelu and gelu_pytorch_tanh"
        )


def _add_pixels(writer: Any, checkpoint: Checkpoint) -> None:
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor.from_pretrained(str(checkpoint.folder))
    writer.add_vision_image_mean([float(value) for value in processor.image_mean])
    writer.add_vision_image_std([float(value) for value in processor.image_std])


def _sources(layers: int) -> dict[str, str]:
    """GGUF's name of every tensor -> transformers'."""
    blocks = {
        f"v.blk.{layer}.{short}.{kind}": f"{TOWER}encoder.layers.{layer}.{name}.{kind}"
        for layer in range(layers)
        for short, name in _BLOCK.items()
        for kind in ("weight", "bias")
    }
    return {**_AROUND, **blocks}
