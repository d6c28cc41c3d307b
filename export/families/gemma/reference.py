"""Where the reference cuts PaliGemma and Gemma 3: a whole SigLIP tower, and prompts that look ahead."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from vtp.export.families.reference import Reference, looked_at
from vtp.export.tower_cues import SCORES, block_of


class SiglipReference(Reference):
    """Features are the tower's last_hidden_state, in some models pooled; cues are of its last layer."""

    @property
    def blocks(self) -> list[Any]:
        return list(self.tower.encoder.layers)

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Features and the cues `wanted` of a picture, from transformers' own tower."""
        tower = self.tower
        keys: list[Tensor] = []
        hook = tower.encoder.layers[-1].self_attn.k_proj.register_forward_hook(
            lambda _module, _inputs, output: keys.append(output)
        )
        try:
            out = tower(pixel_values.to(self.model.dtype), output_attentions=True, return_dict=True)
        finally:
            hook.remove()
        cues = {"image_features": self.pooled(out.last_hidden_state)}
        for name in set(SCORES) & set(wanted):
            received = looked_at(name, out.attentions[block_of(name, len(out.attentions))], has_cls=False)
            cues[name] = self.pooled(received.unsqueeze(2)).squeeze(2)
        if "vision_keys" in wanted:
            cues["vision_keys"] = self.pooled(keys[0])
        return cues

    def pooled(self, patches: Tensor) -> Tensor:
        """What the tower's patches have, [1,.,C], for the P patches that visual tokens are made of."""
        return patches

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.model.get_image_features(pixel_values.to(self.model.dtype), return_dict=True)
        return whole.pooler_output, torch.arange(patches.shape[1])


class PaliGemmaReference(SiglipReference):
    """A prompt is read in both directions; positions count from 1. No prompt outgrows a sliding window."""

    @property
    def lm_head(self) -> Any:
        softcap = getattr(self.model.config.text_config, "final_logit_softcapping", None)
        if softcap is None:
            return self.model.lm_head
        return lambda hidden: torch.tanh(self.model.lm_head(hidden) / softcap) * softcap

    def numbers(self, input_ids: Tensor) -> tuple[Tensor, int]:
        length = input_ids.shape[1]
        return torch.arange(1, length + 1), length + 1

    def mask(self, layer: int, hidden: Tensor, image: Tensor, past: int) -> Tensor | None:
        assert past == 0 or hidden.shape[1] == 1, "a prompt starts on an empty cache"
        return None


class Gemma3Reference(SiglipReference):
    """Visual tokens see all those of their picture; layers differ in window and rotary embedding."""

    def pooled(self, patches: Tensor) -> Tensor:
        projector = self.model.model.multi_modal_projector
        side = projector.patches_per_image
        maps = patches.transpose(1, 2).reshape(1, -1, side, side)
        return projector.avg_pool(maps).flatten(2).transpose(1, 2)

    def project(self, image_features: Tensor) -> Tensor:
        projector = self.model.model.multi_modal_projector
        return projector.mm_soft_emb_norm(image_features) @ projector.mm_input_projection_weight

    def turns(self, layer: int, hidden: Tensor, numbers: Tensor) -> Any:
        kind = self.text.config.layer_types[layer]
        return self.text.rotary_emb(hidden, numbers.unsqueeze(0), kind)

    def mask(self, layer: int, hidden: Tensor, image: Tensor, past: int) -> Tensor | None:
        """Rows see what is before them, in a sliding layer only its window, and a picture all of itself."""
        size = hidden.shape[1]
        place, column = torch.arange(past, past + size)[:, None], torch.arange(past + size)[None]
        seen = column <= place
        if size > 1:
            picture = torch.zeros(size, dtype=torch.int64)  # 0 for text; marks of text lie between pictures
            picture[image] = 1 + (image.diff(prepend=image[:1]) > 1).cumsum(0)
            seen = seen | ((picture[:, None] == picture[None]) & (picture > 0)[:, None])
        if self.text.config.layer_types[layer] == "sliding_attention":
            seen = seen & (column > place - self.text.config.sliding_window)
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, lowest)[None, None]
