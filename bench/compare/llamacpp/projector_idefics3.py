"""SmolVLM's and Idefics3's projector, llama.cpp's `idefics3`: factor x factor patches to a token, one matrix.

llama.cpp (tools/mtmd: clip.cpp, mtmd.cpp, mtmd-image.cpp) cuts a picture as transformers does and names its
tiles by the same tokens, with one difference: a picture of one tile comes twice, as tile 1, 1 and as the
whole picture, where transformers has the whole alone. With two tiles or more both read the same prompt.
"""

from __future__ import annotations

from typing import Any

from vtp.bench.compare.llamacpp.checkpoint import Checkpoint
from vtp.engines import VtpError

NAME = "idefics3"
TOWERS = ("idefics3_vision", "smolvlm_vision")
# What llama.cpp looks up by its text and puts around a picture, without asking whether it found it.
_MARKS = ("<fake_token_around_image>", "<global-img>", "\n", "\n\n")
_LONGEST = 4096  # transformers' processors make no picture longer, whatever their settings say


def used_layers(config: Any) -> int:
    """All of the tower's layers. VtpError for a tower or a factor that `idefics3` does not have."""
    vision = config.vision_config
    if vision.model_type not in TOWERS:
        raise VtpError(f"the GGUF converter takes {' or '.join(TOWERS)} here, not {vision.model_type}")
    if config.scale_factor < 2:
        raise VtpError(f"scale_factor is {config.scale_factor}; llama.cpp's idefics3 takes 2 or more")
    return int(vision.num_hidden_layers)


def sources(checkpoint: Checkpoint) -> dict[str, str]:
    """GGUF's name -> transformers', of the tower's last norm and of the projector."""
    tower, projector = checkpoint.layout.tower, checkpoint.layout.projector
    return {
        "v.post_ln.weight": f"{tower}post_layernorm.weight",
        "v.post_ln.bias": f"{tower}post_layernorm.bias",
        "mm.model.fc.weight": f"{projector}modality_projection.proj.weight",
    }


def add_keys(writer: Any, checkpoint: Checkpoint, edge: int | None) -> None:
    """The factor, and the longest edge that a picture is resized to before it is cut.

    edge  in pixels; None: the checkpoint's own. VtpError if llama.cpp would cut or name tiles otherwise.
    """
    _check_marks(checkpoint)
    writer.add_vision_projector_scale_factor(checkpoint.config.scale_factor)
    writer.add_vision_preproc_image_size(edge or _own_edge(checkpoint))


def _own_edge(checkpoint: Checkpoint) -> int:
    processor, side = checkpoint.image_processor(), checkpoint.config.vision_config.image_size
    tile = int(processor.max_image_size["longest_edge"])
    if tile != side:
        raise VtpError(
            f"tiles of {tile} pixels for a tower of {side}: llama.cpp cuts tiles of the tower's size"
        )
    return min(int(processor.size["longest_edge"]), _LONGEST) if processor.do_image_splitting else tile


def _check_marks(checkpoint: Checkpoint) -> None:
    from tokenizers import Tokenizer

    told = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    for mark in _MARKS:
        count = len(told.encode(mark, add_special_tokens=False).ids)
        if count != 1:
            raise VtpError(
                f"{checkpoint.folder}: llama.cpp puts the token {mark!r} around pictures, which this "
                f"tokenizer cuts into {count}"
            )
