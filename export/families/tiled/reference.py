"""References of the families whose tokens are several patches of the tower: InternVL, Idefics3, SmolVLM.

The views of a picture go through the tower one after the other: eager attention on all of them at once would
take gigabytes where a picture has a dozen.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from vtp.export.families.reference import Reference, looked_at
from vtp.export.tower_cues import SCORES, block_of


class ShuffledReference(Reference):
    """pixel_values [V,3,H,W] are the views of one picture."""

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        views = [self._view(view.unsqueeze(0).to(self.model.dtype), wanted) for view in pixel_values]
        cues = {"image_features": self._tokens_of([view["states"] for view in views])}
        for name in set(SCORES) & set(wanted):
            cues[name] = self._tokens_of([view[name].unsqueeze(2) for view in views]).mean(dim=2)
        if "vision_keys" in wanted:
            cues["vision_keys"] = self._tokens_of([view["keys"] for view in views])
        return cues

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        views = [self._features(view.unsqueeze(0)) for view in pixel_values]
        return torch.cat(views).unsqueeze(0), torch.arange(patches.shape[1])

    def _view(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Of one view [1,3,H,W]: states [1,n,C], keys [1,n,C] and scores float32 [1,n] of its patches."""
        raise NotImplementedError

    def _features(self, pixel_values: Tensor) -> Tensor:
        """transformers' own projected tokens [n,D] of one view."""
        raise NotImplementedError

    def _shuffle(self, patches: Tensor) -> Tensor:
        """transformers' own pixel shuffle of one view: [1,n,C] -> [m,.]."""
        raise NotImplementedError

    def _tokens_of(self, views: list[Tensor]) -> Tensor:
        return torch.cat([self._shuffle(view) for view in views]).unsqueeze(0)

    def _watched(
        self, attentions: list[Any], keys: Any, wanted: Collection[str], pixel_values: Tensor, **more: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The tower's answer, and the cues `wanted` of what its attention modules gave, and keys [1,n,C].

        `attentions` are those of the blocks that the features need.
        """
        seen: dict[str, Tensor] = {}

        def look(name: str) -> Any:
            return lambda _m, _i, output: seen.update({name: looked_at(name, output[1], self.has_cls)})

        hooks = [keys.register_forward_hook(lambda _m, _i, output: seen.update(keys=output))]
        for name in set(SCORES) & set(wanted):
            read = attentions[block_of(name, len(attentions))]
            hooks.append(read.register_forward_hook(look(name)))
        try:
            answer = self.tower(pixel_values, return_dict=True, **more)
        finally:
            for hook in hooks:
                hook.remove()
        return answer, {**seen, "keys": seen["keys"][:, int(self.has_cls) :]}


class ViewsReference(Reference):
    """pixel_values are the patches [P,values] of one picture, of its views one after another.

    Without `view_grids` the picture is one view of `image_size`.
    """

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        views = [
            type(self)(self.model, view_grids=[grid])._seen(rows, wanted)
            for rows, grid in self._views(pixel_values)
        ]
        return {name: torch.cat([view[name] for view in views], dim=1) for name in views[0]}

    def _seen(self, rows: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """What `vision` gives, of one view [n,values], the only one of `view_grids`."""
        raise NotImplementedError

    def _views(self, pixel_values: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
        """The patches [n,values] of every view, and its (rows, columns)."""
        grids = self.view_grids or [self._grid()]
        return list(zip(pixel_values.split([rows * columns for rows, columns in grids]), grids, strict=True))

    def _grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of the only view."""
        if self.view_grids:
            return self.view_grids[0]
        assert self.image_size is not None  # bundles of these families always have one
        edge = self.model.config.vision_config.patch_size
        return self.image_size[0] // edge, self.image_size[1] // edge


class InternVLReference(ShuffledReference):
    """InternVL's: the tower has CLS."""

    has_cls = True

    @property
    def blocks(self) -> list[Any]:
        layers, layer = list(self.tower.encoder.layer), self.model.config.vision_feature_layer
        return layers[: range(len(layers) + 1)[layer]]

    def _view(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        layer, attentions = self.model.config.vision_feature_layer, [one.attention for one in self.blocks]
        out, seen = self._watched(
            attentions, attentions[-1].k_norm, wanted, pixel_values, output_hidden_states=True
        )
        states = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        return {"states": states[:, 1:], **seen}

    def _features(self, pixel_values: Tensor) -> Tensor:
        config = self.model.config
        return self.model.model.get_image_features(
            pixel_values,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output[0]

    def _shuffle(self, patches: Tensor) -> Tensor:
        side = int(patches.shape[1] ** 0.5)
        square = patches.reshape(1, side, side, -1)
        ratio = self.model.config.downsample_ratio
        return self.model.model.pixel_shuffle(square, scale_factor=ratio).flatten(0, 2)


class Idefics3Reference(ShuffledReference):
    """Idefics3's and SmolVLM's: no CLS."""

    has_cls = False

    @property
    def tower(self) -> Any:
        return self.model.model.vision_model

    @property
    def blocks(self) -> list[Any]:
        return list(self.tower.encoder.layers)

    @property
    def text(self) -> Any:
        return self.model.model.text_model

    def project(self, image_features: Tensor) -> Tensor:
        return self.model.model.connector.modality_projection(image_features)

    def _view(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        attentions = [one.self_attn for one in self.blocks]
        out, seen = self._watched(attentions, attentions[-1].k_proj, wanted, pixel_values)
        return {"states": out.last_hidden_state, **seen}

    def _features(self, pixel_values: Tensor) -> Tensor:
        answer = self.model.model.get_image_features(pixel_values.unsqueeze(0), return_dict=True)
        return answer.pooler_output[0]

    def _shuffle(self, patches: Tensor) -> Tensor:
        connector = self.model.model.connector
        return connector.pixel_shuffle(patches, connector.scale_factor)[0]
