"""Trains projector and decoder on frozen tower features: curriculum, checkpoints, resume."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaModel, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtp.scenes.training.checkpoint import Run
from vtp.scenes.training.labels import shows_thing
from vtp.scenes.training.mixed import attend, half_precision
from vtp.scenes.training.packing import SKIP, Packed, masks, pack
from vtp.scenes.training.pool import Pool
from vtp.scenes.training.recipe import Recipe, Stage

QUESTIONS = 10


def answer_logits(
    model: LlavaForConditionalGeneration, features: Tensor, packed: Packed, squeeze: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logits [A, V] at every position that has a label, and those labels [A]."""
    inner = model.model
    embed = inner.language_model.embed_tokens
    visual = inner.multi_modal_projector(features)
    parts = [embed(packed.prefix), visual, embed(packed.middle), embed(packed.blocks.flatten(1))]
    shared = sum(part.shape[1] for part in parts[:-1])
    mask, positions = masks(packed, visual.shape[1], squeeze)
    hidden = _decode(inner.language_model, torch.cat([p.float() for p in parts], 1), mask, positions, shared)
    wanted = packed.labels.flatten(1) != SKIP
    return model.lm_head(hidden[wanted]).float(), packed.labels.flatten(1)[wanted]


def _decode(decoder: LlamaModel, hidden: Tensor, mask: Tensor, positions: Tensor, shared: int) -> Tensor:
    """Final hidden states [B, S - shared, C] of the blocks; the last layer skips all other queries."""
    turns = decoder.rotary_emb(hidden, positions)
    layers: list[Any] = list(decoder.layers)
    *front, last = layers
    for layer in front:
        hidden = layer(
            hidden, attention_mask=mask, position_embeddings=turns, position_ids=positions, shared=shared
        )
    attention, normed = last.self_attn, last.input_layernorm(hidden)
    heads = (*hidden.shape[:2], -1, attention.head_dim)
    query, key, value = (
        project(normed).view(heads).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *turns)
    looked, _ = attend(attention, query[:, :, shared:], key, value, mask[:, :, shared:], attention.scaling)
    hidden = hidden[:, shared:] + attention.o_proj(looked.flatten(2))
    return decoder.norm(hidden + last.mlp(last.post_attention_layernorm(hidden)))


class Tally:
    """Exact-match accuracy per kind, gathered over several batches."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        self.right, self.total = np.zeros(len(kinds)), np.zeros(len(kinds))

    def add(self, logits: Tensor, labels: Tensor, packed: Packed) -> None:
        """Count the questions of a batch whose every answer token came out right."""
        wrong = torch.zeros(packed.labels.shape, dtype=torch.bool)
        wrong[packed.labels != SKIP] = logits.argmax(-1) != labels
        right = (~wrong.any(-1)).flatten().numpy()
        kinds = packed.kinds.flatten().numpy()
        self.total += np.bincount(kinds, minlength=len(self.kinds))
        self.right += np.bincount(kinds, right, minlength=len(self.kinds))

    @property
    def rates(self) -> dict[str, float]:
        """Accuracy by kind."""
        return dict(zip(self.kinds, self.right / np.maximum(self.total, 1), strict=True))


def train_decoder(
    model: LlavaForConditionalGeneration,
    run: Run,
    seed: int,
    recipe: Recipe,
    publish: Callable[[LlavaForConditionalGeneration], None],
) -> None:
    """Train projector and decoder in place through the recipe's stages; goes on from `decoder.pt`."""
    tower = model.model.vision_tower.eval().requires_grad_(False)
    state: dict[str, Any] = run.load("decoder.pt") or {"stage": 0, "step": 0, "picture": 10**7}
    if "model" in state:
        model.load_state_dict(state["model"])
    pool = Pool(tower, state["picture"], 3000 if recipe.form.reads else 6000, recipe.form.reads)
    if "model" not in state and not recipe.grown:
        _fit_projector(model, pool, np.random.default_rng(seed))
    for number in range(state["stage"], len(recipe.decoder)):
        resumed = state if number == state["stage"] else {"step": 0}
        _train_stage(model, pool, run, recipe, number, resumed, seed)
        run.save(
            {"stage": number + 1, "step": 0, "picture": pool.next, "model": model.state_dict()}, "decoder.pt"
        )
        if 336 in recipe.decoder[number].sizes and number + 1 < len(recipe.decoder):
            publish(model)
    publish(model)


@torch.no_grad()
def _fit_projector(model: LlavaForConditionalGeneration, pool: Pool, rng: np.random.Generator) -> None:
    """Start the projector at unit scale for patches that show things; ground is far larger."""
    encoded = pool.sample(168, (2, 3), 64, 64, rng)
    features = torch.stack([e.features for e in encoded]).float()
    on_thing = torch.from_numpy(np.stack([shows_thing(e.picture) for e in encoded]))
    things = features[on_thing]
    projector = model.model.multi_modal_projector
    width = things.shape[1]
    nn.init.normal_(projector.linear_1.weight, std=width**-0.5)
    projector.linear_1.weight /= things.std(0)
    projector.linear_1.bias.copy_(-projector.linear_1.weight @ things.mean(0))
    nn.init.normal_(projector.linear_2.weight, std=width**-0.5)


def _train_stage(
    model: LlavaForConditionalGeneration,
    pool: Pool,
    run: Run,
    recipe: Recipe,
    number: int,
    resumed: dict[str, Any],
    seed: int,
) -> None:
    """Train one stage, from where it stopped: its rate by step, its tally and losses in the log."""
    stage, start = recipe.decoder[number], resumed["step"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    if "optimizer" in resumed:
        optimizer.load_state_dict(resumed["optimizer"])
    rng = np.random.default_rng([seed, number, start])
    run.log(f"{stage.name}: sizes {stage.sizes}, {stage.objects} things, {stage.style}, from step {start}")
    tally, losses = Tally(recipe.kinds), []
    for step in range(start, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * _pace(step, stage)
        loss = _step(model, pool, stage, step, rng, tally)
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % recipe.every == recipe.every - 1:
            rates = tally.rates
            words = "  ".join(f"{kind} {rate:.3f}" for kind, rate in rates.items())
            run.log(f"{stage.name} {step + 1:5d}  loss {np.mean(losses):.3f}  {words}")
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            run.save({"stage": number, "step": step + 1, "picture": pool.next, **states}, "decoder.pt")
            if np.mean(list(rates.values())) >= stage.goal:
                return
            tally, losses = Tally(recipe.kinds), []


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
    fresh, power = round(stage.batch * stage.fresh), 0.7 if stage.loose else 1.2
    encoded = pool.sample(size, stage.objects, number, fresh, rng, power)
    packed = pack([e.picture for e in encoded], QUESTIONS, stage.style, rng, tally.kinds)
    squeeze = float(rng.uniform(0.1, 1.0)) if stage.loose and rng.random() < 0.5 else 1.0
    with half_precision():
        logits, labels = answer_logits(
            model, torch.stack([e.features for e in encoded]).float(), packed, squeeze
        )
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    tally.add(logits.detach(), labels, packed)
    return loss


def _pace(step: int, stage: Stage) -> float:
    """Warm up over 100 steps; the last stage also decays to zero."""
    warm = min(1.0, (step + 1) / 100)
    return warm if stage.goal <= 1 else warm * (1.01 - step / stage.steps)
