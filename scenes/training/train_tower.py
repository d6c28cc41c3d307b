"""The tower's training loop: curriculum, checkpoints, resume."""

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel

from vtp.scenes.training.checkpoint import Run
from vtp.scenes.training.mixed import half_precision
from vtp.scenes.training.reader.teacher import Teacher
from vtp.scenes.training.recipe import Recipe
from vtp.scenes.training.tower import (
    Heads,
    Stream,
    TowerStage,
    tower_forward,
    tower_losses,
    tower_scores,
)

GOALS = ("shape", "character", "slot")  # accuracies that end a stage


def train_tower(tower: CLIPVisionModel, run: Run, seed: int, recipe: Recipe) -> None:
    """Train `tower` in place through the recipe's stages; goes on from `tower.pt` if there."""
    torch.manual_seed(seed)
    heads = Heads(recipe.form.reads)
    if recipe.grown:
        heads.start_silent()
    state: dict[str, Any] = run.load("tower.pt") or {"stage": 0, "step": 0, "picture": 0}
    if "tower" in state:
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
    for number in range(state["stage"], len(recipe.tower)):
        start = state["step"] if number == state["stage"] else 0
        picture = _train_stage(tower, heads, run, recipe, number, start, state["picture"], seed, state)
        state = {"stage": number + 1, "step": 0, "picture": picture}
        run.save({**state, "tower": tower.state_dict(), "heads": heads.state_dict()}, "tower.pt")


def _train_stage(
    tower: CLIPVisionModel,
    heads: Heads,
    run: Run,
    recipe: Recipe,
    number: int,
    start: int,
    picture: int,
    seed: int,
    state: dict[str, Any],
) -> int:
    """One stage from step `start`; returns the next unused training picture."""
    stage, every = recipe.tower[number], recipe.every
    often = max(1, every // 10)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, weight_decay=0.02, betas=(0.9, 0.98), fused=True)
    if start and "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    stream, teacher = Stream(stage, picture, seed), Teacher() if recipe.grown else None
    run.log(f"{stage.name}: sizes {stage.sizes}, batch {stage.batch}, from step {start}")
    sums: dict[str, float] = {}
    for step, (images, corners, targets) in zip(range(start, stage.steps), stream.batches(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * _pace(step, stage)
        with half_precision():
            features, glance = tower_forward(tower, images, corners)
            losses = tower_losses(heads, features, glance, targets)
            if teacher:
                losses["match"] = teacher.loss(images, corners, features, targets)
            loss = sum(losses.values(), torch.zeros(()))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % often == often - 1:
            with half_precision():
                scores = tower_scores(heads, features, glance, targets)
                scores |= {"match": losses["match"].item()} if teacher else {}
                for name, value in scores.items():
                    sums[name] = sums.get(name, 0.0) + value / (every // often)
        if step % every == every - 1:
            run.log(f"{stage.name} {step + 1:5d}  loss {loss.item():.3f}  " + _words(sums))
            models = {
                "tower": tower.state_dict(),
                "heads": heads.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            run.save({"stage": number, "step": step + 1, "picture": stream.next, **models}, "tower.pt")
            if min(sums[name] for name in GOALS if name in sums) >= stage.goal:
                break
            sums = {}
    return stream.next


def _pace(step: int, stage: TowerStage) -> float:
    """Warm up over 100 steps; stages without a reachable goal also decay to zero over their second half."""
    warm = min(1.0, (step + 1) / 100)
    return warm if stage.goal <= 1 else warm * min(1.0, 2 * (1 - step / stage.steps) + 0.01)


def _words(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in values.items())
