"""AdaptPrune (arXiv 2503.08019): attention, distance in the picture and likeness of keys, greedily.

Site: decoder:2 (between layers 1 and 2). Inputs: attention_scores [B,N], the mean over heads of the last
prompt token's row in layer 1, cut to the image; keys [B,N,·], layer 2's k_proj of that layer's input,
heads side by side, without RoPE. Default K: a tenth of the tokens, 57 of 576.

1. The scores are multiplied by a centre prior, a Gaussian of sigma max(H, W) / 2 whose axes run from
   -(side // 2) to side // 2 in `side` steps; its largest value is 1.
2. K times: the token i with the highest score is kept, and every token j within the grid distance
   `radius` (5) has its score multiplied by
   1 - exp(-d² / (2·sigma_space²)) · exp(-(1 - cos(key_i, key_j))² / (2·sigma_feature²))
   with sigma_space 1.5 and sigma_feature 0.05.

Option keys: "plain" (default) applies k_proj to the hidden states without the layer's input norm, as the
published code does; "normed" applies the norm first, the textbook reading. The graph that makes the keys
reads this option; the selection is the same.
Departures from the published code: it leaves a kept token to its own decay, which is nearly 0 but not
always below an underflown neighbour, so a token could be picked twice; here a kept token is out for good.
It assumes a square grid; here each axis has its own side. Similarities are float32 whatever the model's
dtype.
A neighbourhood is at most 81 tokens, yet gathering 81 keys for each of K picks moves more memory than the
products of neighbouring bands cost: those are few large matrix products, made once.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vtp.engines.errors import UsageError
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner

KEYS = ("plain", "normed")
BAND = 128  # least number of tokens in a band: smaller matrix products waste a CPU's width


class AdaptPrune(Pruner):
    """Keeps K tokens greedily; each pick lowers its near and similar neighbours."""

    name = "adaptprune"
    site = "decoder:2"
    needs = ("attention_scores", "keys")
    reads_grid = True
    options: ClassVar[dict[str, Any]] = {
        "radius": 5.0,
        "sigma_space": 1.5,
        "sigma_feature": 0.05,
        "keys": "plain",
    }
    paper = "arXiv 2503.08019"

    prior: Tensor
    table: Tensor

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        super().__init__(grid, keep, **options)
        check_settings(self.settings)
        reach, blur = self.settings["radius"], self.settings["sigma_space"]
        self.register_buffer("prior", centre_prior(grid))
        self.register_buffer("table", near(grid, reach, blur))
        self.sharpness = -0.5 / self.settings["sigma_feature"] ** 2

    @classmethod
    def default_keep(cls, count: int) -> int:
        """A tenth of the N = `count` tokens, rounded down as the published code does: 57 of 576."""
        return max(1, int(count * 0.1))

    def forward(self, attention_scores: Tensor, keys: Tensor) -> Tensor:  # type: ignore[override]
        """attention_scores [B,N], keys [B,N,D] -> keep_indices [B,K]."""
        scores = attention_scores.float() * self.prior
        return ops.raster(self.pick(scores, self.decay(keys)))

    def decay(self, keys: Tensor) -> Tensor:
        """By how much a pick i lowers j: factors [B,N,N], positive off the diagonal, 1 = not at all."""
        rows = keys.float()
        lengths = rows.norm(dim=2, keepdim=True).clamp_min(1e-12)
        # Dividing N² products is cheaper than normalising N·D keys.
        apart = 1 - self.products(rows) / (lengths * lengths.transpose(1, 2))
        return 1 - self.nearness() * torch.exp(apart * apart * self.sharpness)

    def products(self, rows: Tensor) -> Tensor:
        """Dot products [B,N,N] of those rows [B,N,D] that can be within the radius; 0 for the others.

        The picture is cut into bands of rows at least as high as the radius, so that only a band and
        the next one interact: 7 of 16 blocks on a 24x24 grid.
        """
        width = self.grid[1]
        band = max(math.floor(self.settings["radius"]), -(-BAND // width)) * width
        bands = rows.split(band, dim=1)
        same = [torch.matmul(one, one.transpose(1, 2)) for one in bands]
        down = [torch.matmul(one, two.transpose(1, 2)) for one, two in pairwise(bands)]
        lines = []
        for place, block in enumerate(same):
            before = [down[place - 1].transpose(1, 2)] if place else []
            after = down[place : place + 1]
            line = torch.cat([*before, block, *after], dim=2)
            start = max(place - 1, 0) * band
            lines.append(functional.pad(line, (start, self.count - start - line.shape[2])))
        return torch.cat(lines, dim=1)

    def nearness(self) -> Tensor:
        """The spatial factors [N,N]."""
        return ops.by_distance(self.table, self.grid)

    def pick(self, scores: Tensor, decay: Tensor) -> Tensor:
        """Greedy picks [B,K] in order of picking, from scores [B,N] and factors [B,N,N].

        A kept token's score is -inf and stays so: every factor that meets it is positive.
        """
        batch = scores.shape[0]
        gone = torch.full((1, 1), -torch.inf).expand(batch, 1)
        first = torch.arange(batch) * self.count
        factors = decay.reshape(-1, self.count)
        picks = []
        for step in range(self.keep):
            best = scores.argmax(dim=1)
            picks.append(best.unsqueeze(1))
            if step + 1 < self.keep:
                row = functional.embedding(best if batch == 1 else best + first, factors)
                scores = torch.scatter(scores * row, 1, picks[-1], gone)
        return torch.cat(picks, dim=1)


def centre_prior(grid: tuple[int, int]) -> Tensor:
    """Weights float32 [N] that fall off from the centre of the grid; the largest is 1."""
    height, width = (
        torch.linspace(-(side // 2), side // 2, side, dtype=torch.float64) if side > 1 else torch.zeros(1)
        for side in grid
    )
    square = height.double().square().unsqueeze(1) + width.double().square()
    prior = torch.exp(-square / (2 * (max(grid) / 2) ** 2)).flatten()
    return (prior / prior.max()).float()


def near(grid: tuple[int, int], radius: float, sigma: float) -> Tensor:
    """exp(-d²/(2·sigma²)) within `radius`, else 0: float32 [H·W,1], indexed by |dy|·W + |dx|."""
    y = torch.arange(grid[0], dtype=torch.float64).unsqueeze(1)
    x = torch.arange(grid[1], dtype=torch.float64)
    square = y * y + x * x
    factors = torch.exp(-square / (2 * sigma**2)) * (square <= radius**2)
    return factors.float().reshape(-1, 1)


def check_settings(settings: dict[str, Any]) -> None:
    """Raise UsageError for options out of range; sigma_space is bounded so that no factor becomes 0."""
    for name, high in (("radius", 1e4), ("sigma_space", 1e3), ("sigma_feature", 1e3)):
        low = 0.0 if name == "radius" else 1e-3
        if not low <= settings[name] <= high:
            raise UsageError(f"method adaptprune: {name} {settings[name]} is outside {low:g} to {high:g}")
    if settings["keys"] not in KEYS:
        raise UsageError(f"method adaptprune: keys is '{settings['keys']}'; choose {' or '.join(KEYS)}")
