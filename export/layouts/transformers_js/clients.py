"""What transformers.js 4 calls a family, and how its processor writes a picture into the prompt.

Source: npm @huggingface/transformers 4.3.2, src/models/<family>/processing_*.js and modeling_*.js.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Client:
    """One family's classes in transformers.js, and what sets it apart there.

    processor        its processor's class
    image_processor  its image processor's class
    around           what its processor writes in front of a picture's image tokens, and behind them
    first_position   the number of the prompt's first position
    views            whether `pixel_values` are [prompts, pictures, 3, H, W], with a mask that nobody reads
    chat             whether a prompt is made by a chat template, or by the processor alone
    """

    processor: str
    image_processor: str
    around: tuple[str, str] = ("", "")
    first_position: int = 0
    views: bool = False
    chat: bool = True


_IDEFICS3_MARKS = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")

CLIENTS = {
    "llava": Client("LlavaProcessor", "CLIPImageProcessor"),
    "paligemma": Client("PaliGemmaProcessor", "SiglipImageProcessor", first_position=1, chat=False),
    "gemma3": Client("Gemma3Processor", "Gemma3ImageProcessor"),
    "idefics3": Client("Idefics3Processor", "Idefics3ImageProcessor", _IDEFICS3_MARKS, views=True),
    "smolvlm": Client("SmolVLMProcessor", "SmolVLMImageProcessor", _IDEFICS3_MARKS, views=True),
}

# Families that a bundle may be of and this layout does not serve -> why.
_NO_CLASS = "transformers.js has no class for it"
_PLACES = "transformers.js numbers positions by the whole picture, and this family's kept tokens keep theirs"
_STATES = "its decoder has states beside the KV cache, which the layout's decoder does not pass on"
UNSERVED = {
    "llava_next": _NO_CLASS,
    "llava_onevision": "transformers.js cuts no picture into tiles as this family's processor does",
    "internvl": _NO_CLASS,
    "video_llava": _NO_CLASS,
    "qwen2_vl": _PLACES,
    "qwen2_5_vl": _PLACES,
    "qwen3_vl": _PLACES,
    "lfm2_vl": _STATES,
    "minicpmv4_6": _STATES,
    "qwen3_5": _STATES,
}
