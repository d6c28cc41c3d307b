"""Where the reference cuts Qwen-VL models: patches and merged tokens, positions along three axes."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from vtp.export.families.reference import Reference
from vtp.export.patched import patched
from vtp.export.tower_cues import SCORES, block_of


class PatchReference(Reference):
    """Qwen2-VL's: pixel_values are the patches [P,values] of one picture."""

    @property
    def tower(self) -> Any:
        return self.model.model.visual

    @property
    def mlp(self) -> Any:
        """The part of the merger that takes a token's patches side by side."""
        return self.tower.merger.mlp

    @property
    def grid(self) -> Tensor:
        """image_grid_thw int64 [1,3]."""
        assert self.image_size is not None  # bundles of this family always have one
        patch = self.model.config.vision_config.patch_size
        return torch.tensor([[1, *(edge // patch for edge in self.image_size)]])

    def order(self) -> Tensor:
        """int64 [N]: where in the tower's own order the visual tokens are."""
        merge = self.model.config.vision_config.spatial_merge_size
        return torch.arange(int(self.grid.prod()) // merge**2)

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """As `Reference.vision`: image_features [1,N,C] are what enters the merger's MLP.

        Scores are the mean over a token's patches of the attention they receive, mean over heads and all rows
        (0 from other windows); vision_keys the last block's keys, those of its patches side by side.
        """
        blocks, module = list(self.tower.blocks), sys.modules[type(self.tower).__module__]
        eager, entering, rows = module.eager_attention_forward, list[Tensor](), list[Tensor]()
        last, scores = blocks[-1].attn, set(SCORES) & set(wanted)
        weights: dict[Any, list[Tensor]] = {blocks[block_of(name, len(blocks))].attn: [] for name in scores}

        def watched(attention: Any, *args: Any, **kwargs: Any) -> Any:
            answer = eager(attention, *args, **kwargs)
            if attention in weights:
                weights[attention].append(answer[1][0])
            return answer

        hooks = [
            self.mlp.register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0])),
            last.qkv.register_forward_hook(lambda _module, _inputs, output: rows.append(output)),
        ]
        try:
            with patched(module, "eager_attention_forward", watched):
                self.tower(pixel_values.to(self.model.dtype), grid_thw=self.grid)
        finally:
            for hook in hooks:
                hook.remove()
        order, width = self.order(), rows[0].shape[1] // 3
        cues = {
            "image_features": entering[0][order],
            "vision_keys": rows[0][:, width : 2 * width].reshape(len(order), -1)[order],
        }
        for name in scores:
            read = weights[blocks[block_of(name, len(blocks))].attn]
            received = torch.cat([chunk.float().mean(dim=0).sum(dim=0) for chunk in read]) / len(rows[0])
            cues[name] = received.view(len(order), -1).mean(dim=1)[order]
        return {name: cue[None] for name, cue in cues.items() if name in {"image_features", *wanted}}

    def project(self, image_features: Tensor) -> Tensor:
        return self.mlp(image_features)

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.model.get_image_features(pixel_values, self.grid, return_dict=True)
        return tokens.pooler_output[0][None], torch.arange(patches.shape[1])

    def numbers(self, input_ids: Tensor) -> tuple[Tensor, int]:
        kinds = (input_ids == self.model.config.image_token_id).int()
        grids = self.grid.repeat(int(kinds.sum()) // len(self.order()), 1)  # one for every picture
        numbers, _ = self.model.model.get_rope_index(input_ids, kinds, image_grid_thw=grids)
        return numbers[:, 0], int(numbers.max()) + 1


class WindowReference(PatchReference):
    """Qwen2.5-VL's: the tower takes the visual tokens window by window."""

    def order(self) -> Tensor:
        from transformers.vision_utils import get_vision_window_index

        vision = self.model.config.vision_config
        index, _ = get_vision_window_index(
            self.grid, vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        return index.argsort()


class MergedReference(PatchReference):
    """Qwen3.5's: the merger's MLP is its two layers."""

    @property
    def mlp(self) -> Any:
        return self.tower.merger.linear_fc1

    def project(self, image_features: Tensor) -> Tensor:
        merger = self.tower.merger
        main = image_features[..., : merger.linear_fc1.in_features]  # Qwen3-VL's rows hold the others too
        return merger.linear_fc2(merger.act_fn(merger.linear_fc1(main)))


class DeepReference(MergedReference):
    """Qwen3-VL's: features of earlier tower blocks are added to visual tokens after the first layers."""

    deep: list[Tensor]  # by decoder layer: of every picture looked at, one after the other

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.model.get_image_features(pixel_values, self.grid, return_dict=True)
        own, before = [block[0] for block in tokens.deepstack_features], getattr(self, "deep", [])
        self.deep = [torch.cat(pair) for pair in zip(before, own, strict=True)] if before else own
        return tokens.pooler_output[0][None], torch.arange(patches.shape[1])

    def after(self, layer: int, hidden: Tensor, image: Tensor, kept: Tensor) -> Tensor:
        if layer >= len(self.deep):
            return hidden
        return hidden.index_add(1, image, self.deep[layer][kept][None].to(hidden.dtype))
