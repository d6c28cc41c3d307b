"""SmolVLM and SmolVLM2: Idefics3 with a smaller decoder and 16 patches to a token; pictures, no video.

Source: transformers' modeling_smolvlm.py (Marafioti et al., arXiv 2504.05299), whose picture side is
Idefics3's.
"""

from __future__ import annotations

from vtp.export.families.tiled.idefics3 import Idefics3


class SmolVLM(Idefics3):
    """SmolVLMForConditionalGeneration."""

    name = "smolvlm"
    architectures = ("SmolVLMForConditionalGeneration",)
    limits = "as idefics3"


FAMILY = SmolVLM
