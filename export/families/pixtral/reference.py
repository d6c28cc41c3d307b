"""Where the reference cuts Mistral 3: merged patches, and layers that are told the positions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vtp.export.families.reference import Reference, looked_at
from vtp.export.tower_cues import SCORES, block_of


class PixtralReference(Reference):
    """pixel_values are those of one picture, [1,3,H,W]."""

    @property
    def blocks(self) -> list[Any]:
        layers, layer = list(self.tower.transformer.layers), self.model.config.vision_feature_layer
        return layers[: range(len(layers) + 1)[layer]]

    @property
    def has_cls(self) -> bool:
        return False

    @property
    def edge(self) -> int:
        """Patches of a token along an edge."""
        return self.model.config.spatial_merge_size

    @property
    def projector(self) -> Any:
        """Norm, merging of patches, two linear layers."""
        return self.model.model.multi_modal_projector

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Features [1,N,C] of the merged tokens and the `wanted` cues, by hooks in the unmodified tower.

        pixel_values [1,3,H,W]. A token's scores are the mean of its patches', its vision_keys theirs side by
        side.
        """
        blocks, seen = self.blocks, dict[str, Tensor]()

        def look(name: str) -> Any:
            return lambda _m, _i, output: seen.update({name: looked_at(name, output[1], has_cls=False)})

        hooks = [
            blocks[block_of(name, len(blocks))].attention.register_forward_hook(look(name))
            for name in set(SCORES) & set(wanted)
        ]
        hooks.append(
            blocks[-1].attention.k_proj.register_forward_hook(
                lambda _m, _i, output: seen.update(vision_keys=output)
            )
        )
        try:
            out = self.tower(
                pixel_values.to(self.model.dtype),
                image_sizes=self._sizes(pixel_values),
                output_hidden_states=True,
                return_dict=True,
            )
        finally:
            for hook in hooks:
                hook.remove()
        states = out.hidden_states[self.model.config.vision_feature_layer]
        cues = {"image_features": self._side_by_side(self.normed(states), pixel_values)}
        for name in set(SCORES) & set(wanted):
            cues[name] = self._side_by_side(seen[name].unsqueeze(2), pixel_values).mean(dim=2)
        if "vision_keys" in wanted:
            cues["vision_keys"] = self._side_by_side(seen["vision_keys"], pixel_values)
        return cues

    def normed(self, states: Tensor) -> Tensor:
        """What the tower's patches go through before they are merged."""
        return self.projector.norm(states)

    def project(self, image_features: Tensor) -> Tensor:
        projector = self.projector
        merged = projector.patch_merger.merging_layer(image_features)
        return projector.linear_2(projector.act(projector.linear_1(merged)))

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.model.model.get_image_features(
            pixel_values.to(self.model.dtype), image_sizes=self._sizes(pixel_values), return_dict=True
        )
        return whole.pooler_output[0][None], torch.arange(patches.shape[1])

    def beside_attention(self, numbers: Tensor) -> dict[str, Any]:
        return {"position_ids": numbers.unsqueeze(0)}

    def _sizes(self, pixel_values: Tensor) -> Tensor:
        return torch.tensor([pixel_values.shape[-2:]])

    def _side_by_side(self, patches: Tensor, pixel_values: Tensor) -> Tensor:
        """[1,P,C] -> [1,N,C·edge²], by torch's own unfold."""
        rows, columns = (edge // self.tower.patch_size for edge in pixel_values.shape[-2:])
        grid = patches.transpose(1, 2).reshape(1, -1, rows, columns)
        edge = self.edge
        return functional.unfold(grid, kernel_size=edge, stride=edge).transpose(1, 2)
