"""LLaVA's projector, llama.cpp's `mlp`: two matrices over the patches of one of the tower's layers."""

from __future__ import annotations

from typing import Any

from vtp.bench.compare.llamacpp.checkpoint import Checkpoint
from vtp.engines import VtpError

NAME = "mlp"
TOWERS = ("clip_vision_model", "siglip_vision_model")


def used_layers(config: Any) -> int:
    """How many of the tower's layers make the features. VtpError for what llama.cpp's `mlp` does not have."""
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
    used = range(vision.num_hidden_layers + 1)[layer]
    if used == 0:
        raise VtpError("the GGUF converter takes the output of a layer, not of the embeddings")
    if not with_class and used == vision.num_hidden_layers:
        raise VtpError("llama.cpp's SigLIP for this projector ends before the last norm")
    return used


def sources(checkpoint: Checkpoint) -> dict[str, str]:
    """GGUF's name -> transformers', of the projector and of what only CLIP's towers have."""
    tower, projector = checkpoint.layout.tower, checkpoint.layout.projector
    return {
        "v.class_embd": f"{tower}embeddings.class_embedding",
        "v.pre_ln.weight": f"{tower}pre_layrnorm.weight",
        "v.pre_ln.bias": f"{tower}pre_layrnorm.bias",
        "mm.0.weight": f"{projector}linear_1.weight",
        "mm.0.bias": f"{projector}linear_1.bias",
        "mm.2.weight": f"{projector}linear_2.weight",
        "mm.2.bias": f"{projector}linear_2.bias",
    }


def add_keys(writer: Any, checkpoint: Checkpoint, edge: int | None) -> None:
    """The layer whose output the projector reads; without it llama.cpp leaves out one layer more.

    `edge` is nothing to it: a picture is resized to the tower's size.
    """
    writer.add_array("clip.vision.feature_layer", [used_layers(checkpoint.config)])
