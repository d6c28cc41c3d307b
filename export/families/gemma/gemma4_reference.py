"""Where the reference cuts Gemma 4: pooled patches, layers that share keys and values, inputs per layer."""

from __future__ import annotations

import sys
from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import KVSharingDict

from vtp.export.families.reference import Reference, looked_at
from vtp.export.tower_cues import SCORES, block_of


class Gemma4Reference(Reference):
    """pixel_values are the patches [P,values] of one picture."""

    inputs: Tensor | None = None  # of every layer, [1,S,L,side]

    @cached_property
    def shared(self) -> KVSharingDict:
        """Keys and values that later layers take from earlier ones."""
        return KVSharingDict()

    @property
    def blocks(self) -> list[Any]:
        return list(self.tower.encoder.layers)

    @property
    def has_cls(self) -> bool:
        return False

    @property
    def places(self) -> Tensor:
        """image_position_ids int64 [1,P,2]: column and row."""
        assert self.image_size is not None  # bundles of this family always have one
        rows, columns = (edge // self.model.config.vision_config.patch_size for edge in self.image_size)
        return torch.tensor([[(x, y) for y in range(rows) for x in range(columns)]])

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """As `Reference.vision`; what the tower's patches have is pooled as its last layer's answer is."""
        seen: dict[str, Tensor] = {}
        count = len(self.blocks)

        def look(name: str) -> Any:
            return lambda _m, _i, output: seen.update({name: looked_at(name, output[1], has_cls=False)})

        hooks = [
            self.blocks[block_of(name, count)].self_attn.register_forward_hook(look(name))
            for name in set(SCORES) & set(wanted)
        ]
        hooks.append(
            self.blocks[-1].self_attn.k_norm.register_forward_hook(
                lambda _m, _i, output: seen.update(vision_keys=output.flatten(2))
            )
        )
        try:
            out = self.tower(pixel_values[None].to(self.model.dtype), pixel_position_ids=self.places)
        finally:
            for hook in hooks:
                hook.remove()
        cues = {name: self._pooled(seen[name]) for name in {*SCORES, "vision_keys"} & set(wanted)}
        return {"image_features": out.last_hidden_state[None], **cues}

    def _pooled(self, values: Tensor) -> Tensor:
        """What the patches have, [1,P] or [1,P,.], in the tower's own pooler, without its scale."""
        rows = values if values.dim() == 3 else values.unsqueeze(2)
        length = rows.shape[1] // self.model.config.vision_config.pooling_kernel_size**2
        pooled, _ = self.tower.pooler._avg_pool_by_positions(rows, self.places, length)
        return pooled if values.dim() == 3 else pooled.squeeze(2)

    def project(self, image_features: Tensor) -> Tensor:
        return self.model.model.embed_vision(image_features)

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        pixels = pixel_values[None].to(self.model.dtype)
        whole = self.model.model.get_image_features(pixels, self.places, return_dict=True)
        return whole.pooler_output[0][None], torch.arange(patches.shape[1])

    @property
    def lm_head(self) -> Any:
        softcap = self.text.config.final_logit_softcapping
        if softcap is None:
            return self.model.lm_head
        return lambda hidden: torch.tanh(self.model.lm_head(hidden) / softcap) * softcap

    def begin(self, input_ids: Tensor, hidden: Tensor) -> None:
        if self.text.config.hidden_size_per_layer_input:
            ids = torch.where(input_ids == self.token_id, self.text.config.pad_token_id, input_ids)
            rows = self.text.get_per_layer_inputs(ids)
            self.inputs = self.text.project_per_layer_inputs(hidden, rows)

    def cut(self, stay: Tensor) -> None:
        if self.inputs is not None:
            self.inputs = self.inputs[:, stay]

    def beside(self, layer: int, numbers: Tensor) -> dict[str, Any]:
        own = None if self.inputs is None else self.inputs[:, :, layer]
        return {"per_layer_input": own, "shared_kv_states": self.shared}

    def beside_attention(self, numbers: Tensor) -> dict[str, Any]:
        return {"shared_kv_states": KVSharingDict()}

    def turns(self, layer: int, hidden: Tensor, numbers: Tensor) -> Any:
        return self.text.rotary_emb(hidden, numbers.unsqueeze(0), self.text.config.layer_types[layer])

    def turn(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return sys.modules[type(self.text).__module__].apply_rotary_pos_emb(rows, cos, sin)

    def mask(self, layer: int, hidden: Tensor, image: Tensor, past: int) -> Tensor | None:
        """Rows see what is before them, in a sliding layer only its window and, in larger models, a picture
        all of itself."""
        config, size = self.text.config, hidden.shape[1]
        kind = config.layer_types[layer]
        if self.text.layers[layer].self_attn.is_kv_shared_layer:  # its cache is another layer's
            past = self.shared[kind][0].shape[2] - size
        place, column = torch.arange(past, past + size)[:, None], torch.arange(past + size)[None]
        seen = column <= place
        if kind == "sliding_attention":
            if config.use_bidirectional_attention == "vision" and size > 1:
                picture = torch.zeros(size, dtype=torch.int64)  # 0 for text; text lies between pictures
                picture[image] = 1 + (image.diff(prepend=image[:1]) > 1).cumsum(0)
                seen = seen | ((picture[:, None] == picture[None]) & (picture > 0)[:, None])
            seen = seen & (column > place - config.sliding_window)
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, lowest)[None, None]
