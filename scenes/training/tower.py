"""Trains the CLIP tower alone, with throw-away heads on the features that the projector will read.

Per patch: shape and colour from the true pixel masks, the thing's centre, and whether the patch holds it. For
CLS: counts and areas per shape and colour, read from the attention output of the scoring layer itself, so
that its attention must cover every thing (a presence-only target makes it look at one patch of each). Where
there are signs, also the character and its slot per patch, and for CLS the area of each character.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from vtp.scenes.generator.pictures import COLORS, PATCH, SHAPES, draw, training_seed
from vtp.scenes.generator.signs import ALPHABET
from vtp.scenes.training.labels import IGNORE, ON_PLATE, SLOTS, Labels, patch_labels
from vtp.scenes.training.recipe import TowerStage

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
WIDTH = 128


def preprocess(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to CLIP's normalised float32 [B, 3, H, W]."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (images - MEAN) / STD


def tower_forward(
    tower: CLIPVisionModel, images: Tensor, corners: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Features without CLS [B, N, C] of the last layer but one; its CLS attention output [B, C].

    `corners` int64 [B, 2]: row and column in the tower's grid at which each picture stands, if they do.
    """
    inner = getattr(tower, "vision_model", tower)
    if corners is None:
        embedded = inner.embeddings(images, interpolate_pos_encoding=True)
    else:
        embedded = _embed_windows(inner.embeddings, images, corners)
    hidden = inner.pre_layrnorm(embedded)
    layers: list[Any] = list(inner.encoder.layers)[:-2]  # the last layer is never used
    scoring: Any = inner.encoder.layers[-2]
    for layer in layers:
        hidden = layer(hidden, attention_mask=None)
    glance, _ = scoring.self_attn(scoring.layer_norm1(hidden), attention_mask=None)
    hidden = hidden + glance
    hidden = hidden + scoring.mlp(scoring.layer_norm2(hidden))
    return hidden[:, 1:], glance[:, 0]


def _embed_windows(embeddings: Any, images: Tensor, corners: Tensor) -> Tensor:
    """CLIP's embeddings [B, 1 + N, C] of windows with the position embeddings of their places."""
    patches = embeddings.patch_embedding(images)
    side, whole = patches.shape[-1], embeddings.image_size // embeddings.patch_size
    rows, cols = (corners[:, i, None] + torch.arange(side) for i in (0, 1))
    places = 1 + (rows[:, :, None] * whole + cols[:, None, :]).flatten(1)
    position = embeddings.position_embedding.weight
    first = (embeddings.class_embedding + position[0]).expand(len(images), 1, -1)
    return torch.cat((first, patches.flatten(2).transpose(1, 2) + position[places]), 1)


class Heads(nn.Module):
    """The throw-away heads; those of signs only where signs are read."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.shape = nn.Linear(WIDTH, len(SHAPES) + 1)
        self.color = nn.Linear(WIDTH, len(COLORS) + 1)
        self.places = nn.Linear(WIDTH, 5)  # centre x, y; right?; bottom?; anchor?
        words = 2 * (len(SHAPES) + len(COLORS))
        self.summary = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, words))
        self.reads = reads
        if reads:
            self.character = nn.Linear(WIDTH, len(ALPHABET) + 1)
            self.slot = nn.Linear(WIDTH, len(SLOTS) + 1)
            self.text = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, len(ALPHABET)))
            self.ends = nn.Linear(WIDTH, 2)

    def start_silent(self) -> None:
        """Begin at zero: heads that know nothing must not push a tower that knows something."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer.out_features != 256:
                nn.init.zeros_(layer.weight)


@dataclass
class Targets:
    """Stacked `Labels`: [B, N] each; centre [B, N, 2]; summary [B, 32]."""

    shape: Tensor
    color: Tensor
    centre: Tensor
    anchor: Tensor
    summary: Tensor
    character: Tensor
    slot: Tensor
    ends: Tensor
    plate: Tensor


def stack(labels: list[Labels]) -> Targets:
    """Stack the labels of several pictures of one size."""
    names = Targets.__dataclass_fields__
    return Targets(*(torch.from_numpy(np.stack([getattr(label, n) for label in labels])) for n in names))


Sample = tuple[np.ndarray, tuple[int, int], Labels]


class Stream:
    """Endless training batches of one stage: a quarter fresh, the rest drawn from the latest pictures."""

    def __init__(self, stage: TowerStage, first: int, seed: int, grid: int = 24) -> None:
        self.stage, self.next, self.rng, self.grid = stage, first, np.random.default_rng([seed, first]), grid
        self.pools: dict[int, list[Sample]] = {size: [] for size in stage.sizes}

    def batches(self, reuse: int = 4, keep: int = 3000) -> Iterator[tuple[Tensor, Tensor | None, Targets]]:
        """Yield normalised images [B, 3, H, W], their corners [B, 2] if they are windows, and targets."""
        for step in range(1 << 62):
            size = self.stage.sizes[step % len(self.stage.sizes)]
            batch = self.stage.batch_of(size)
            pool = self.pools[size]
            fresh = batch if len(pool) < 500 else batch // reuse
            pool += [self._sample(size) for _ in range(fresh)]
            del pool[:-keep]
            picks = [pool[i] for i in self.rng.integers(0, len(pool), batch - fresh)] + pool[-fresh:]
            images = preprocess(np.stack([pixels for pixels, _, _ in picks]))
            corners = torch.tensor([corner for _, corner, _ in picks]) if self.stage.windows else None
            yield images, corners, stack([labels for _, _, labels in picks])

    def _sample(self, size: int) -> Sample:
        stage, side = self.stage, size // PATCH
        picture = draw(
            training_seed(self.next), size, objects_for(size, stage.objects), objects_for(size, stage.signs)
        )
        self.next += 1
        if not stage.windows:
            return picture.pixels, (0, 0), patch_labels(picture)
        row, col = (int(v) for v in self.rng.integers(0, self.grid - side + 1, 2))
        return picture.pixels, (row, col), patch_labels(picture, (row, col), self.grid)


def objects_for(size: int, objects: tuple[int, int], power: float = 1.2) -> tuple[int, int]:
    """Fewer things on a smaller picture, so that they fit; a lower `power` crowds them."""
    most = max(min(1, objects[1]), min(objects[1], round(objects[1] * (size / 336) ** power)))
    return min(objects[0], most), most


def tower_losses(heads: Heads, features: Tensor, glance: Tensor, targets: Targets) -> dict[str, Tensor]:
    """The loss of each head; things weigh as much as ground although they cover few patches."""
    on_thing = targets.shape > 0
    places = heads.places(features)
    quarter = (targets.centre > 0).float()
    anchor_weight = 1 + 10 * targets.anchor
    losses = {
        "shape": _balanced(heads.shape(features), targets.shape),
        "color": _balanced(heads.color(features), targets.color),
        "centre": 2 * F.l1_loss(places[..., :2][on_thing], targets.centre[on_thing]),
        "quarter": F.binary_cross_entropy_with_logits(places[..., 2:4][on_thing], quarter[on_thing]),
        "anchor": F.binary_cross_entropy_with_logits(places[..., 4], targets.anchor, anchor_weight),
        "summary": F.smooth_l1_loss(heads.summary(glance), targets.summary, beta=0.2),
    }
    return losses | _sign_losses(heads, features, glance, targets) if heads.reads else losses


def _sign_losses(heads: Heads, features: Tensor, glance: Tensor, targets: Targets) -> dict[str, Tensor]:
    near = targets.plate >= ON_PLATE
    return {
        "ends": 2 * F.l1_loss(heads.ends(features)[near], targets.ends[near]),
        "character": _balanced(heads.character(features), targets.character),
        "slot": _balanced(heads.slot(features), targets.slot),
        "text": F.smooth_l1_loss(heads.text(glance), _shown(targets.character), beta=0.2),
    }


def _shown(character: Tensor) -> Tensor:
    """In how many patches each character is shown, float32 [B, A]."""
    return F.one_hot(character.clamp(min=0), len(ALPHABET) + 1)[..., 1:].sum(1).float()


def _balanced(logits: Tensor, truth: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), ignore_index=IGNORE, reduction="none")
    losses, truth = losses.float(), truth.flatten()
    return (losses * (truth > 0)).sum() / (truth > 0).sum() + (losses * (truth == 0)).sum() / (
        truth == 0
    ).sum()


@torch.no_grad()
def tower_scores(heads: Heads, features: Tensor, glance: Tensor, targets: Targets) -> dict[str, float]:
    """Accuracies on patches of things, of ground, of quarters and anchors, and of counts above zero."""
    thing = targets.shape > 0
    shape, color = heads.shape(features).argmax(-1), heads.color(features).argmax(-1)
    places = heads.places(features)
    words = len(SHAPES) + len(COLORS)
    guess, truth = heads.summary(glance)[:, :words].round(), targets.summary[:, :words]
    scores = {
        "shape": (shape == targets.shape)[thing].float().mean().item(),
        "color": (color == targets.color)[thing].float().mean().item(),
        "ground": (shape == 0)[targets.shape == 0].float().mean().item(),
        "quarter": ((places[..., 2:4] > 0) == (targets.centre > 0))[thing].all(-1).float().mean().item(),
        "anchor": (places[..., 4] > 0)[targets.anchor > 0].float().mean().item(),
        "counts": (guess == truth)[truth > 0].float().mean().item(),
    }
    if heads.reads:
        text = targets.character > 0
        for name in ("character", "slot"):
            right = getattr(heads, name)(features).argmax(-1) == getattr(targets, name)
            scores[name] = right[text].float().mean().item()
        away = (heads.ends(features) - targets.ends)[text].abs()
        scores["ends"] = (away < 0.1).all(-1).float().mean().item()
    return scores
