"""Mistral 3 (Small 3.1 and 3.2, Ministral 3): Pixtral's tower, merged patches, a mark after every row.

Source: transformers' modeling_mistral3.py, modeling_pixtral.py and processing_pixtral.py. In the prompt every
row of a picture's tokens ends with [IMG_BREAK], the last one with [IMG_END]; these are text, and whatever is
pruned, they stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from vtp.engines import VtpError
from vtp.export.families.base import DECODERS, Family
from vtp.export.families.pixtral.reference import PixtralReference
from vtp.export.families.pixtral.tower import Merging, MergingProjector, PixtralTower
from vtp.export.families.reference import Reference
from vtp.export.families.tiled.runs import Runs, RunsDecoderPruner, RunsSplice, RunsTextCues
from vtp.export.graphs.decoder import Decoder
from vtp.export.graphs.pruner import DecoderPruner
from vtp.export.graphs.splice import Splice, TextCues
from vtp.export.pruners.base import Pruner
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.pixtral import PixtralSpec

_MARKS = ("[IMG_BREAK]", "[IMG_END]")


class Mistral3(Family):
    """Mistral3ForConditionalGeneration."""

    name = "mistral3"
    architectures = ("Mistral3ForConditionalGeneration",)
    sites = ("vision", "projector", "decoder")
    several = True
    decoders: ClassVar[tuple[str, ...]] = (*DECODERS, "ministral3")
    image_kinds = ("pixtral",)
    reference: ClassVar[type[Reference]] = PixtralReference
    unreduced = "its tower takes any size of picture; choose a smaller --image-size"
    limits = (
        "one image size per bundle; the marks at the ends of rows are never pruned; one vision_feature_layer"
    )
    size: tuple[int, int]

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """VtpError for a decoder, a tower or a feature layer that is not served."""
        cls.check_decoder((config.get("text_config") or {}).get("model_type", "mistral"))
        tower = (config.get("vision_config") or {}).get("model_type", "pixtral")
        if tower != "pixtral":
            raise VtpError(f"this model's vision tower is '{tower}'; supported towers: pixtral")
        layer = config.get("vision_feature_layer", -1)
        if not isinstance(layer, int):
            raise VtpError(f"vision_feature_layer is {layer!r}; only one layer, a whole number, is supported")

    def prepare(self, image: ImageSpec) -> None:
        """Check that the processor makes whole tokens, and count them."""
        assert isinstance(image, PixtralSpec)  # see image_kinds
        if image.patch_size != self._token:
            raise VtpError(
                f"the image processor makes tokens of {image.patch_size} pixels along an edge, the model "
                f"takes {self._token}; fix patch_size and spatial_merge_size of processor_config.json"
            )
        self.size = image.image_size

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // self._token, self.size[1] // self._token

    @property
    def image_size(self) -> tuple[int, int]:
        return self.size

    @property
    def feature_width(self) -> int:
        return self._vision.hidden_size * self._edge**2

    @property
    def decoder(self) -> Decoder:
        text = self.model.model.language_model
        return Decoder(text, self.model.lm_head, numbered=text.config.model_type == "ministral3")

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def read_marks(self, tokenizer: Any) -> None:
        known = tokenizer.get_vocab()
        if missing := [mark for mark in _MARKS if mark not in known]:
            raise VtpError(
                f"the tokenizer does not know {' and '.join(missing)}, the marks of a picture's rows"
            )
        self._break, self._end = (known[mark] for mark in _MARKS)

    @property
    def placeholder_ids(self) -> list[int]:
        rows = self.grid[0]
        return [*[self.image_token_id, self._break] * (rows - 1), self.image_token_id, self._end]

    @property
    def placeholders(self) -> int:
        return 2 * self.grid[0] - 1

    @property
    def picture_ids(self) -> list[int]:
        rows, columns = self.grid
        row = [self.image_token_id] * columns
        return [*[*row, self._break] * (rows - 1), *row]

    @property
    def runs(self) -> Runs:
        """The rows of tokens, and the mark between each and the next."""
        rows, columns = self.grid
        return Runs((columns,) * rows, (1,) * (rows - 1))

    @property
    def tower(self) -> Any:
        return self.model.model.vision_tower

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        layers = list(self.tower.transformer.layers)[: self._feature_layer()]
        rows, columns = (edge // self._vision.patch_size for edge in self.size)
        return PixtralTower(self.tower, layers, self._norm, Merging(rows, columns, self._edge), cues)

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its patches
        return MergingProjector(self.model.model.multi_modal_projector)

    def splice(self, positions: str) -> Splice:
        if self.grid[0] == 1:
            return super().splice(positions)
        return RunsSplice(self.placeholders, self.runs, positions)

    def text_cues(self) -> TextCues:
        return super().text_cues() if self.grid[0] == 1 else RunsTextCues(self.placeholders, self.runs)

    def decoder_pruner(self, pruner: Pruner, others: Sequence[str]) -> DecoderPruner:
        if self.grid[0] == 1:
            return super().decoder_pruner(pruner, others)
        return RunsDecoderPruner(pruner, others, self.runs)

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config

    @property
    def _norm(self) -> nn.Module:
        """What the tower's patches go through before they are merged."""
        return self.model.model.multi_modal_projector.norm

    @property
    def _edge(self) -> int:
        """Patches of a token along an edge."""
        return self.model.config.spatial_merge_size

    @property
    def _token(self) -> int:
        """Pixels of a token along an edge."""
        return self._vision.patch_size * self._edge

    def _feature_layer(self) -> int:
        """How many layers run: hidden_states[0] is the embedding, [i] comes out of the i-th layer."""
        layer, count = self.model.config.vision_feature_layer, self._vision.num_hidden_layers
        number = layer if layer >= 0 else count + 1 + layer
        if not 1 <= number <= count:
            raise VtpError(f"vision_feature_layer {layer} is not one of the tower's {count} layers")
        return number


FAMILY = Mistral3
