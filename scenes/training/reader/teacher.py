"""The first model's view of a picture, which the growing tower is held to wherever no sign is."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from vtp.scenes.training.reader.grow import load_first
from vtp.scenes.training.tower import Targets, tower_forward

LOOKS = 4


class Teacher(nn.Module):
    """Compares features where they matter: behind the first model's projector, at the scale of things."""

    def __init__(self) -> None:
        super().__init__()
        first = load_first().eval().requires_grad_(False)
        self.tower: CLIPVisionModel = first.model.vision_tower
        self.projector = first.model.multi_modal_projector

    def loss(self, images: Tensor, corners: Tensor | None, features: Tensor, targets: Targets) -> Tensor:
        """Squared distance over the variance of things' patches; ground counts a third, plates nothing.

        Only every fourth picture is looked at: a tenth of the step's time would go into it otherwise.
        """
        images, features = images[::LOOKS], features[::LOOKS]
        shape, plate = targets.shape[::LOOKS], targets.plate[::LOOKS]
        corners = None if corners is None else corners[::LOOKS]
        with torch.no_grad():
            wanted = self.projector(tower_forward(self.tower, images, corners)[0]).float()
        things, ground = (shape > 0) & (plate == 0), (shape == 0) & (plate == 0)
        spread = wanted[things].var(0).mean()
        away = F.mse_loss(self.projector(features).float(), wanted, reduction="none").mean(-1) / spread
        return away[things].mean() + away[ground].mean() / 3
