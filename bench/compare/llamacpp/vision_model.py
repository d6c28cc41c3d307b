"""The image encoder of a model as GGUF (an "mmproj" file): CLIP or SigLIP, and one of two projectors."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vtp.bench.compare.llamacpp import projector_idefics3, projector_mlp
from vtp.bench.compare.llamacpp.checkpoint import Checkpoint
from vtp.bench.compare.llamacpp.text_model import finish
from vtp.engines import VtpError

# Of a projector's module: NAME, used_layers, sources, add_keys.
_PROJECTORS: dict[str, ModuleType] = {
    "llava": projector_mlp,
    "idefics3": projector_idefics3,
    "smolvlm": projector_idefics3,
}
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
_EMBEDDINGS = {
    "v.patch_embd.weight": "embeddings.patch_embedding.weight",
    "v.patch_embd.bias": "embeddings.patch_embedding.bias",
    "v.position_embd.weight": "embeddings.position_embedding.weight",
}


def write_vision_model(checkpoint: Checkpoint, path: Path, edge: int | None = None) -> None:
    """Write tower and projector in float32: the layers up to the one whose output the projector reads.

    edge  longest edge that a picture is resized to before it is cut into tiles; None: the checkpoint's own

    Raises VtpError for a tower, projector or tokenizer that llama.cpp does not have.
    """
    from gguf import GGUFWriter

    projector = _PROJECTORS[checkpoint.kind]
    layers = projector.used_layers(checkpoint.config)
    writer = GGUFWriter(path, "clip")
    writer.add_clip_projector_type(projector.NAME)
    _add_sizes(writer, checkpoint.config, layers)
    _add_pixels(writer, checkpoint)
    projector.add_keys(writer, checkpoint, edge)
    for name, source in {**_sources(checkpoint, layers), **projector.sources(checkpoint)}.items():
        if source in checkpoint:
            writer.add_tensor(name, np.ascontiguousarray(checkpoint.tensor(source)))
    finish(writer)


def _add_sizes(writer: Any, config: Any, layers: int) -> None:
    vision = config.vision_config
    if vision.hidden_size == vision.intermediate_size:
        raise VtpError(
            "llama.cpp tells the two matrices of an MLP apart by their widths, which are equal here"
        )
    writer.add_file_type(0)
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
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
    processor = checkpoint.image_processor()
    writer.add_vision_image_mean([float(value) for value in processor.image_mean])
    writer.add_vision_image_std([float(value) for value in processor.image_std])


def _sources(checkpoint: Checkpoint, layers: int) -> dict[str, str]:
    """GGUF's name of every tensor of the tower's embeddings and layers -> transformers'."""
    tower = checkpoint.layout.tower
    blocks = {
        f"v.blk.{layer}.{short}.{kind}": f"{tower}encoder.layers.{layer}.{name}.{kind}"
        for layer in range(layers)
        for short, name in _BLOCK.items()
        for kind in ("weight", "bias")
    }
    return {**{name: f"{tower}{source}" for name, source in _EMBEDDINGS.items()}, **blocks}
