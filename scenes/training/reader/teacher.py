"""The first model's view of a picture, which the growing tower is held to wherever no sign is."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from vtp.scenes.training.reader.grow import load_first
from vtp.scenes.training.tower import Targets, tower_forward


class Teacher(nn.Module):
    """Compares features where they matter: behind the first model's projector, at the scale of things."""

    def __init__(self) -> None:
        super().__init__()
        first = load_first().eval().requires_grad_(False)
        self.tower: CLIPVisionModel = first.model.vision_tower
        self.projector = first.model.multi_modal_projector

    def loss(self, images: Tensor, corners: Tensor | None, features: Tensor, targets: Targets) -> Tensor:
        """Squared distance over the variance of things' patches; ground counts a third, plates nothing."""
        with torch.no_grad():
            wanted = self.projector(tower_forward(self.tower, images, corners)[0]).float()
        on_thing, off = targets.shape > 0, targets.plate > 0
        spread = wanted[on_thing].var(0).mean()
        away = F.mse_loss(self.projector(features).float(), wanted, reduction="none").mean(-1) / spread
        ground = ~on_thing & ~off & (targets.shape == 0)
        return away[on_thing & ~off].mean() + away[ground].mean() / 3
