"""Trains the CLIP tower alone, with throw-away heads on the features that the projector will read.

Per patch: shape and colour from the true pixel masks, the thing's centre, and whether the patch holds it. For
CLS: counts and areas per shape and colour, read from the attention output of the scoring layer itself, so
that its attention must cover every thing (a presence-only target makes it look at one patch of each).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from vtp.scenes.generator.pictures import COLORS, SHAPES, draw, training_seed
from vtp.scenes.training.labels import IGNORE, Labels, patch_labels

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
WIDTH = 128


@dataclass(frozen=True)
class TowerStage:
    """One step of the tower's curriculum; it ends at `goal` (shape accuracy on things) or after `steps`."""

    name: str
    sizes: tuple[int, ...]
    objects: tuple[int, int]
    batch: int
    rate: float
    goal: float
    steps: int


STAGES = (
    TowerStage("tower-168", (168,), (1, 3), 48, 1e-3, 0.93, 1800),
    TowerStage("tower-mix", (336, 168, 336, 224, 336, 280), (3, 6), 24, 1e-3, 2.0, 600),
)


def preprocess(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to CLIP's normalised float32 [B, 3, H, W]."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (images - MEAN) / STD


def tower_forward(tower: CLIPVisionModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features without CLS [B, N, C] of the last layer but one; its CLS attention output [B, C]."""
    inner = getattr(tower, "vision_model", tower)
    hidden = inner.pre_layrnorm(inner.embeddings(images, interpolate_pos_encoding=True))
    layers: list[Any] = list(inner.encoder.layers)[:-2]  # the last layer is never used
    scoring: Any = inner.encoder.layers[-2]
    for layer in layers:
        hidden = layer(hidden, attention_mask=None)
    glance, _ = scoring.self_attn(scoring.layer_norm1(hidden), attention_mask=None)
    hidden = hidden + glance
    hidden = hidden + scoring.mlp(scoring.layer_norm2(hidden))
    return hidden[:, 1:], glance[:, 0]


class Heads(nn.Module):
    """The throw-away heads."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = nn.Linear(WIDTH, len(SHAPES) + 1)
        self.color = nn.Linear(WIDTH, len(COLORS) + 1)
        self.places = nn.Linear(WIDTH, 5)  # centre x, y; right?; bottom?; anchor?
        words = 2 * (len(SHAPES) + len(COLORS))
        self.summary = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, words))


@dataclass
class Targets:
    """Stacked `Labels`: shape, color [B, N]; centre [B, N, 2]; anchor [B, N]; summary [B, 32]."""

    shape: Tensor
    color: Tensor
    centre: Tensor
    anchor: Tensor
    summary: Tensor


def stack(labels: list[Labels]) -> Targets:
    """Stack the labels of several pictures of one size."""
    names = ("shape", "color", "centre", "anchor", "summary")
    return Targets(*(torch.from_numpy(np.stack([getattr(label, n) for label in labels])) for n in names))


class Stream:
    """Endless training batches of one stage: a quarter fresh, the rest drawn from the latest pictures."""

    def __init__(self, stage: TowerStage, first: int, seed: int) -> None:
        self.stage, self.next, self.rng = stage, first, np.random.default_rng([seed, first])
        self.pools: dict[int, list[tuple[np.ndarray, Labels]]] = {size: [] for size in stage.sizes}

    def batches(self, reuse: int = 4, keep: int = 3000) -> Iterator[tuple[Tensor, Targets]]:
        """Yield normalised images [B, 3, H, W] and targets."""
        for step in range(1 << 62):
            size = self.stage.sizes[step % len(self.stage.sizes)]
            pool = self.pools[size]
            fresh = self.stage.batch if len(pool) < 500 else self.stage.batch // reuse
            for _ in range(fresh):
                picture = draw(training_seed(self.next), size, objects_for(size, self.stage.objects))
                pool.append((picture.pixels, patch_labels(picture)))
                self.next += 1
            del pool[:-keep]
            picks = [pool[i] for i in self.rng.integers(0, len(pool), self.stage.batch - fresh)] + pool[
                -fresh:
            ]
            yield preprocess(np.stack([p for p, _ in picks])), stack([t for _, t in picks])


def objects_for(size: int, objects: tuple[int, int], power: float = 1.2) -> tuple[int, int]:
    """Fewer things on a smaller picture, so that they fit; a lower `power` crowds them."""
    most = max(1, min(objects[1], round(objects[1] * (size / 336) ** power)))
    return min(objects[0], most), most


def tower_losses(heads: Heads, features: Tensor, glance: Tensor, targets: Targets) -> dict[str, Tensor]:
    """The loss of each head; things weigh as much as ground although they cover few patches."""
    on_thing = targets.shape > 0
    places = heads.places(features)
    quarter = (targets.centre > 0).float()
    anchor_weight = 1 + 10 * targets.anchor
    return {
        "shape": _balanced(heads.shape(features), targets.shape),
        "color": _balanced(heads.color(features), targets.color),
        "centre": 2 * F.l1_loss(places[..., :2][on_thing], targets.centre[on_thing]),
        "quarter": F.binary_cross_entropy_with_logits(places[..., 2:4][on_thing], quarter[on_thing]),
        "anchor": F.binary_cross_entropy_with_logits(places[..., 4], targets.anchor, anchor_weight),
        "summary": F.smooth_l1_loss(heads.summary(glance), targets.summary, beta=0.2),
    }


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
    return {
        "shape": (shape == targets.shape)[thing].float().mean().item(),
        "color": (color == targets.color)[thing].float().mean().item(),
        "ground": (shape == 0)[targets.shape == 0].float().mean().item(),
        "quarter": ((places[..., 2:4] > 0) == (targets.centre > 0))[thing].all(-1).float().mean().item(),
        "anchor": (places[..., 4] > 0)[targets.anchor > 0].float().mean().item(),
        "counts": (guess == truth)[truth > 0].float().mean().item(),
    }
