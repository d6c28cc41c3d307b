"""Trains projector and decoder on frozen tower features: curriculum, checkpoints, resume."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from vtp.scenes.checkpoint import Run
from vtp.scenes.generator import KINDS
from vtp.scenes.mixed import half_precision
from vtp.scenes.packing import SKIP, Packed, masks, pack
from vtp.scenes.pool import Pool

EVERY = 100
QUESTIONS = 10


@dataclass(frozen=True)
class Stage:
    """One step of the decoder's curriculum: it ends at `goal` or after `steps`.

    `goal` bounds the mean accuracy over all kinds. `batch` is the number of pictures of 336 pixels; smaller
    ones come in larger batches.
    """

    name: str
    sizes: tuple[int, ...]
    objects: tuple[int, int]
    style: str
    batch: int
    rate: float
    goal: float
    steps: int


STAGES = (
    Stage("bare-168", (168,), (1, 4), "bare", 16, 2e-3, 0.95, 2500),
    Stage("full-168", (168,), (1, 6), "full", 16, 1.5e-3, 0.93, 1500),
    Stage("full-252", (252, 168), (2, 6), "full", 16, 1.5e-3, 0.93, 1200),
    Stage("full-336", (336, 224), (3, 6), "full", 16, 1.5e-3, 0.95, 1200),
    Stage("chat", (336, 168, 336, 224, 280, 336, 140, 308), (3, 6), "chat", 16, 1.5e-3, 2.0, 3000),
)


def answer_logits(
    model: LlavaForConditionalGeneration, features: Tensor, packed: Packed
) -> tuple[Tensor, Tensor]:
    """Logits [A, V] at every position that has a label, and those labels [A]."""
    inner = model.model
    embed = inner.language_model.embed_tokens
    visual = inner.multi_modal_projector(features)
    _, questions, length = packed.blocks.shape
    parts = [embed(packed.prefix), visual, embed(packed.middle), embed(packed.blocks.flatten(1))]
    shared = sum(part.shape[1] for part in parts[:-1])
    mask, positions = masks(shared, questions, length)
    hidden = inner.language_model(
        inputs_embeds=torch.cat([p.float() for p in parts], 1),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        shared=shared,
    ).last_hidden_state[:, shared:]
    wanted = packed.labels.flatten(1) != SKIP
    return model.lm_head(hidden[wanted]).float(), packed.labels.flatten(1)[wanted]


class Tally:
    """Exact-match accuracy per kind, gathered over several batches."""

    def __init__(self) -> None:
        self.right, self.total = np.zeros(len(KINDS)), np.zeros(len(KINDS))

    def add(self, logits: Tensor, labels: Tensor, packed: Packed) -> None:
        """Count the questions of a batch whose every answer token came out right."""
        wrong = torch.zeros(packed.labels.shape, dtype=torch.bool)
        wrong[packed.labels != SKIP] = logits.argmax(-1) != labels
        right = (~wrong.any(-1)).flatten().numpy()
        kinds = packed.kinds.flatten().numpy()
        self.total += np.bincount(kinds, minlength=len(KINDS))
        self.right += np.bincount(kinds, right, minlength=len(KINDS))

    @property
    def rates(self) -> dict[str, float]:
        """Accuracy by kind."""
        return dict(zip(KINDS, self.right / np.maximum(self.total, 1), strict=True))


def train_decoder(
    model: LlavaForConditionalGeneration,
    run: Run,
    seed: int,
    publish: Callable[[LlavaForConditionalGeneration], None],
) -> None:
    """Train projector and decoder in place through `STAGES`; goes on from `decoder.pt` if there."""
    tower = model.model.vision_tower.eval().requires_grad_(False)
    state: dict[str, Any] = run.load("decoder.pt") or {"stage": 0, "step": 0, "picture": 10**7}
    if "model" in state:
        model.load_state_dict(state["model"])
    pool = Pool(tower, state["picture"])
    for number in range(state["stage"], len(STAGES)):
        resumed = state if number == state["stage"] else {"step": 0}
        _train_stage(model, pool, run, number, resumed, seed)
        run.save(
            {"stage": number + 1, "step": 0, "picture": pool.next, "model": model.state_dict()}, "decoder.pt"
        )
        if 336 in STAGES[number].sizes:
            publish(model)


def _train_stage(
    model: LlavaForConditionalGeneration,
    pool: Pool,
    run: Run,
    number: int,
    resumed: dict[str, Any],
    seed: int,
) -> None:
    stage, start = STAGES[number], resumed["step"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    if "optimizer" in resumed:
        optimizer.load_state_dict(resumed["optimizer"])
    rng = np.random.default_rng([seed, number, start])
    run.log(f"{stage.name}: sizes {stage.sizes}, {stage.objects} things, {stage.style}, from step {start}")
    tally, losses = Tally(), []
    for step in range(start, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * _pace(step, stage)
        loss = _step(model, pool, stage, step, rng, tally)
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == EVERY - 1:
            rates = tally.rates
            words = "  ".join(f"{kind} {rate:.3f}" for kind, rate in rates.items())
            run.log(f"{stage.name} {step + 1:5d}  loss {np.mean(losses):.3f}  {words}")
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            run.save({"stage": number, "step": step + 1, "picture": pool.next, **states}, "decoder.pt")
            if np.mean(list(rates.values())) >= stage.goal:
                return
            tally, losses = Tally(), []


def _step(
    model: LlavaForConditionalGeneration,
    pool: Pool,
    stage: Stage,
    step: int,
    rng: np.random.Generator,
    tally: Tally,
) -> Tensor:
    """Forward and backward pass of one batch; returns its loss."""
    size = stage.sizes[step % len(stage.sizes)]
    number = min(3 * stage.batch, round(stage.batch * (336 / size) ** 1.6))
    encoded = pool.sample(size, stage.objects, number, max(2, stage.batch // 4), rng)
    packed = pack([e.picture for e in encoded], QUESTIONS, stage.style, rng)
    with half_precision():
        logits, labels = answer_logits(model, torch.stack([e.features for e in encoded]).float(), packed)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    tally.add(logits.detach(), labels, packed)
    return loss


def _pace(step: int, stage: Stage) -> float:
    """Warm up over 100 steps; the last stage also decays to zero over its second half."""
    warm = min(1.0, (step + 1) / 100)
    return warm if stage.goal <= 1 else warm * min(1.0, 2 * (1 - step / stage.steps) + 0.01)
