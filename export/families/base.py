"""What a family is: the facts by which the exporter splits one kind of vision-language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from vtp.engines import UsageError, VtpError
from vtp.export.families.reference import Reference
from vtp.export.families.tiles import Tile, equal_tiles
from vtp.export.graphs.decoder import Decoder
from vtp.export.graphs.frames import Frames
from vtp.export.graphs.pruner import DecoderPruner
from vtp.export.graphs.splice import Splice, TextCues
from vtp.export.pruners.base import Pruner
from vtp.export.towers.base import RowReduction, TowerReduction, TowerShape
from vtp.export.towers.downsample import Downsample
from vtp.export.towers.stc import Stc
from vtp.runtime.preprocess import ImageSpec

# Decoders whose attention, rotary embedding and norms the emitter was held against transformers with.
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
# Decoders of models that are served with others: mixtures of experts.
EXPERTS = ("gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text")
# Rotary embeddings whose frequencies depend on the position alone, not on how long the prompt is.
ROTARY = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class Reduced:
    """A tower with a reduction: its last block works on `rows` of the `of` rows that it would have."""

    reduction: TowerReduction
    rows: int
    of: int


class Family(ABC):
    """One loaded model of a family, and where it is cut.

    Class attributes:
    name            the file's name
    architectures   class names in config.json's `architectures` that the family serves
    sites           kinds of pruning site it serves: "vision", "projector", "decoder"
    limits          what it does not serve, in words for `--list-families`
    lacks           cues of pruners that it cannot give, or "grid" -> why; `prepare` may say it for one model
    image_kinds     kinds of image preprocessing that its pictures may go through
    several         whether a prompt may hold several pictures
    positions       how its kept tokens may be numbered: "compact", "original" or either
    decoders        kinds of decoder (model_type) that it may have
    template        chat template that stands for what its processor does to a prompt; None: the model's own
    reference       its reference: where an unmodified transformers model is cut
    media           what it looks at: "image", or "video" for a family's `clips`
    clips           the same models as a family that answers about videos, where they can
    reductions      the tower reductions that it serves; `unreduced`: why not others, `unreused`: why not stc

    reduced is what `reduce` was given: None for a whole tower.
    """

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    sites: ClassVar[tuple[str, ...]]
    limits: ClassVar[str] = ""
    lacks: Mapping[str, str] = MappingProxyType({})
    image_kinds: ClassVar[tuple[str, ...]] = ("clip",)
    several: ClassVar[bool] = False
    positions: ClassVar[tuple[str, ...]] = ("compact", "original")
    decoders: ClassVar[tuple[str, ...]] = DECODERS
    template: ClassVar[str | None] = None
    reference: ClassVar[type[Reference]] = Reference
    media: ClassVar[str] = "image"
    clips: ClassVar[type[Family] | None] = None
    reductions: ClassVar[tuple[str, ...]] = ()
    unreduced: ClassVar[str] = ""
    unreused: ClassVar[str] = ""
    reduced: Reduced | None = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.check_decoder(self.decoder.model.config.model_type)
        for rotary in _rotary_kinds(getattr(self.decoder.model.config, "rope_parameters", None) or {}):
            if rotary not in ROTARY:
                raise VtpError(f"this model's rotary embedding is '{rotary}'; supported: {', '.join(ROTARY)}")
        if self.decoder.head_dim % 8:
            raise VtpError(
                f"head size {self.decoder.head_dim} is not a multiple of 8, which GroupQueryAttention needs; "
                "this model cannot be exported for target ort"
            )

    @classmethod
    def takes(cls, config: dict[str, Any]) -> bool:
        """Whether a config.json of one of its architectures is this family's: two may share one."""
        del config
        return True

    @classmethod
    @abstractmethod
    def check(cls, config: dict[str, Any]) -> None:
        """Raise VtpError for a config.json that the family cannot serve, before its weights are loaded."""

    @classmethod
    def check_decoder(cls, kind: str) -> None:
        """Raise VtpError for a decoder's model_type that is not in `decoders`."""
        if kind in EXPERTS:
            raise VtpError(
                f"this model's decoder is '{kind}', whose layers have experts, and no graph is written yet "
                f"that runs a token's own experts alone; supported decoders: {', '.join(cls.decoders)}"
            )
        if kind not in cls.decoders:
            raise VtpError(f"this model's decoder is '{kind}'; supported decoders: {', '.join(cls.decoders)}")

    @classmethod
    def check_reduction(cls, name: str) -> None:
        """Raise UsageError for a tower reduction that is not in `reductions`."""
        if name not in cls.reductions:
            served = ", ".join(("none", *cls.reductions))
            why = cls.unreused if name == Stc.name and cls.unreused else cls.unreduced
            because = f": {why}" if why else ""
            raise UsageError(f"family {cls.name} does not serve tower {name}{because}; choose {served}")

    @property
    def tower_shape(self) -> TowerShape:
        """The part of the vision tower that runs, for families with `reductions`."""
        raise NotImplementedError

    def reduce(self, reduction: TowerReduction, image: ImageSpec) -> ImageSpec:
        """Do less work in the tower from now on; how pictures are cut then. Called once, before `prepare`.

        Raises UsageError for what the family or this model's tower does not serve.
        """
        self.check_reduction(reduction.name)
        of = self.tower_shape.rows
        if isinstance(reduction, Downsample):
            image = reduction.resample(self.tower.embeddings, self.model.config.vision_config, image)
        reduction.check(self.tower_shape)
        self.reduced = Reduced(reduction, reduction.rows(self.tower_shape), of)
        return image

    @property
    def row_reduction(self) -> RowReduction | None:
        """What the tower's blocks are to do with fewer rows; None: nothing."""
        kind = self.reduced.reduction if self.reduced else None
        return kind if isinstance(kind, RowReduction) else None

    @property
    def stream_reuse(self) -> Stc | None:
        """What the tower is to reuse of a camera's earlier pictures; None: nothing."""
        kind = self.reduced.reduction if self.reduced else None
        return kind if isinstance(kind, Stc) else None

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the visual tokens; N is their product."""

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of the P patches that vision and projector sites choose from; `grid`, unless the
        N visual tokens hold some that show nothing, such as the ends of lines."""
        return self.grid

    def places(self) -> Tensor | None:
        """int64 [P]: the places of the patches among the N tokens; None where they are the same."""
        return None

    @property
    def tiles(self) -> Sequence[Tile]:
        """The tiles of a picture, which hold all P patches; none where it is looked at in one piece."""
        return ()

    @property
    def frame_tiles(self) -> Sequence[Tile]:
        """The frames of a video as tiles, in their order; none for pictures and for a single frame."""
        return equal_tiles(self.layout.count, self.layout.grid) if self.layout else ()

    @property
    def layout(self) -> Frames | None:
        """How the tokens of a video's frames lie; None for pictures."""
        return None

    @property
    def pooled(self) -> int:
        """How many features of a clip the projector takes, where it makes fewer patches of them; else 0."""
        return 0

    @property
    def views(self) -> int:
        """V: how many tiles of a picture, or frames of a video, go through the tower; `pixel_values` is then
        [V,3,H,W]."""
        return 1

    @property
    def apart(self) -> bool:
        """Whether a picture's tiles may go through the tower in any number: their tokens just follow one
        another."""
        return False

    @property
    def patches(self) -> tuple[int, int] | None:
        """Shape of `pixel_values` where a picture comes in as patches [patches, values]; else None."""
        return None

    def prepare(self, image: ImageSpec) -> None:
        """Take note of how pictures are cut; called once, before anything else is asked."""
        del image

    def read_marks(self, tokenizer: Any) -> None:
        """Take note of the ids of the marks around and between a picture's tokens; called after `prepare`."""
        del tokenizer

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(H, W) of pixel_values."""

    @property
    @abstractmethod
    def feature_width(self) -> int:
        """C: width of image_features before the projector, without deepstack features."""

    @property
    def widths(self) -> dict[str, int]:
        """What methods see of tensors that deepstack features travel beside."""
        embeds = dict.fromkeys(("image_embeds", "text_embeds", "hidden_states"), self.decoder.width)
        return {"image_features": self.feature_width, **embeds}

    @property
    @abstractmethod
    def decoder(self) -> Decoder:
        """The decoder's parts."""

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """The id that stands for the picture in input_ids."""

    @property
    def placeholders(self) -> int:
        """Ids from a picture's first to its last in the input_ids given to the graphs (not N: the splice
        widens them)."""
        return 1

    @property
    def placeholder_ids(self) -> list[int]:
        """What replaces the image token in the input_ids given to the graphs: the `placeholders` ids, and the
        marks that transformers' processor puts in front of them and behind."""
        return [self.image_token_id] * self.placeholders

    @property
    def picture_ids(self) -> list[int]:
        """Ids of one picture in the prompt that transformers sees: N image tokens, and what lies between the
        first and the last."""
        return [self.image_token_id] * (self.grid[0] * self.grid[1])

    def image_text(self, token: Callable[[int], str]) -> tuple[str, str]:
        """(what the chat template writes for a picture, what its processor makes of that before the text is
        tokenized, with the image token once), where these differ. `token` gives the text of an id."""
        del token
        return "", ""

    @property
    def tower(self) -> Any:
        """The vision model whose attention is replaced while its graph is traced."""
        return None

    @abstractmethod
    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        """pixel_values -> image_features [B,P,C], then the cues asked for: attention_scores, vision_keys."""

    def later_encoder(self, cues: Sequence[str]) -> nn.Module:
        """pixel_values and a reference picture's state -> the same of a later picture of a camera, then which
        rows were recomputed and how much it is like the reference; for families that serve tower stc."""
        raise NotImplementedError

    def whole_encoder(self) -> nn.Module:
        """pixel_values -> what `projector(whole=True)` takes, where that is more than the P patches."""
        return self.vision_encoder(())

    @abstractmethod
    def projector(self, whole: bool) -> nn.Module:
        """image_features -> image_embeds: of all N tokens if `whole`, else of the features that came in."""

    def splice(self, positions: str) -> Splice:
        """The rule for places and positions; `positions` is "compact" or "original"."""
        return Splice(self.placeholders, self.grid[0] * self.grid[1], positions)

    def text_cues(self) -> TextCues:
        """inputs_embeds, image_start, text_length -> text_embeds, text_mask, text_rows."""
        return TextCues(self.placeholders, self.grid[0] * self.grid[1])

    def decoder_pruner(self, pruner: Pruner, others: Sequence[str]) -> DecoderPruner:
        """A decoder-site pruner, which finds the visual tokens in the prompt; `others` names its inputs."""
        return DecoderPruner(pruner, others, self.widths)


def _rotary_kinds(rope: Mapping[str, Any]) -> list[str]:
    """The kinds of rotary embedding that `rope_parameters` names: one, or one for each kind of layer."""
    kinds = [part for part in rope.values() if isinstance(part, Mapping)] or [rope]
    return [part.get("rope_type", "default") for part in kinds]


def marks_of(tokenizer: Any, names: Sequence[str]) -> list[str]:
    """The special tokens that a tokenizer has under its own names, such as "start_image_token".

    Raises VtpError if it lacks one.
    """
    marks = [mark for name in names if (mark := getattr(tokenizer, name, None)) is not None]
    if len(marks) < len(names):
        raise VtpError(
            f"the tokenizer does not say what its {' and '.join(names)} are; fix tokenizer_config.json"
        )
    return marks
