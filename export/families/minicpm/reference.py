"""Where the reference cuts MiniCPM-V 4.6: packed patches of views, rows that are merged on the way."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from vtp.export.families.tiled.reference import ViewsReference
from vtp.export.patched import patched
from vtp.export.tower_cues import SCORES, block_of


class MiniCPMReference(ViewsReference):
    """image_features [1,N,4·C] are what enters the projector."""

    def _seen(self, rows: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        layers, module = list(self.tower.encoder.layers), sys.modules[type(self.tower).__module__]
        eager, weights = module.eager_attention_forward, dict[Any, Tensor]()
        entering, keys = list[Tensor](), list[Tensor]()

        def watched(attention: Any, *args: Any, **kwargs: Any) -> Any:
            answer = eager(attention, *args, **kwargs)
            weights[attention] = answer[1]
            return answer

        mlp, last = self.model.model.merger.mlp[0], layers[-1].self_attn
        hooks = [
            mlp.register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0])),
            last.k_proj.register_forward_hook(lambda _module, _inputs, output: keys.append(output)),
        ]
        try:
            with patched(module, "eager_attention_forward", watched):
                self._looked(rows)
        finally:
            for hook in hooks:
                hook.remove()
        cues = {"image_features": entering[0][None], "vision_keys": self._side_by_side(keys[0][0])[None]}
        for name in set(SCORES) & set(wanted):
            received = weights[layers[block_of(name, len(layers))].self_attn].float().mean(dim=(1, 2))
            cues[name] = self._side_by_side(received[0][:, None]).mean(dim=1)[None]
        return {name: cue for name, cue in cues.items() if name in {"image_features", *wanted}}

    def project(self, image_features: Tensor) -> Tensor:
        return self.model.model.merger.mlp[0](image_features)[None]

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        return self._looked(pixel_values)[None], torch.arange(patches.shape[1])

    def _looked(self, pixel_values: Tensor) -> Tensor:
        """transformers' own tokens [N,D] of a picture, whose patches it takes side by side in one row."""
        edge = self.model.config.vision_config.patch_size
        packed = pixel_values.view(-1, 3, edge, edge).permute(1, 2, 0, 3).reshape(1, 3, edge, -1)
        sizes = torch.tensor([grid for _, grid in self._views(pixel_values)], dtype=torch.int32)
        answer = self.model.model.get_image_features(packed.to(self.model.dtype), sizes, return_dict=True)
        return torch.cat(answer.pooler_output)

    def _side_by_side(self, rows: Tensor) -> Tensor:
        """Of every patch [P,.] or merged one [P/4,.] -> of the tokens [N,.], theirs side by side."""
        high, wide = self._grid()
        edge = 4 if len(rows) == high * wide else 2  # of a token, in these rows
        high, wide = high // 4, wide // 4
        parts = rows.reshape(high, edge, wide, edge, -1).permute(0, 2, 1, 3, 4)
        return parts.reshape(high * wide, -1)
