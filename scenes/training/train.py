"""Trains a built-in model, with resume: `python -m vtp.scenes.training.train [--recipe reader]`."""

import argparse
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from vtp.scenes import model_dir
from vtp.scenes.training.checkpoint import Run
from vtp.scenes.training.decoder import train_decoder
from vtp.scenes.training.deepen import deepen
from vtp.scenes.training.folder import build_model, save
from vtp.scenes.training.mixed import register_attention, settle_memory
from vtp.scenes.training.reader.grow import grow
from vtp.scenes.training.recipe import RECIPES, Recipe
from vtp.scenes.training.train_tower import train_tower


def main() -> None:
    """Parse the command line and train, or only write a randomly initialised model."""
    parser = argparse.ArgumentParser(prog="python -m vtp.scenes.training.train", description=__doc__)
    parser.add_argument(
        "--recipe", choices=RECIPES, default="model", help="which model (default: %(default)s)"
    )
    parser.add_argument("--run", type=Path, help="folder of checkpoints and log (default: in build/)")
    parser.add_argument("--output", type=Path, help="folder of the model (default: built-in)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of torch (default: as many as cores)")
    parser.add_argument(
        "--init-only", action="store_true", help="write the model as it is before training and stop"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = RECIPES[options.recipe]
    output = options.output or model_dir().with_name(recipe.name)
    model = grow(recipe.form, options.seed) if recipe.grown else build_model(options.seed, recipe.form)
    if options.init_only:
        save(model, output, recipe.form.reads)
        return
    train(model, recipe, Run(options.run or Path("build", recipe.run)), options.seed, output)


def train(model: LlavaForConditionalGeneration, recipe: Recipe, run: Run, seed: int, output: Path) -> None:
    """Train tower, then projector and decoder, in place; writes `output` at the end and in between."""
    settle_memory()
    model.set_attn_implementation(register_attention())
    train_tower(model.model.vision_tower, run, seed, recipe)

    def publish(trained: LlavaForConditionalGeneration) -> None:
        save(deepen(trained, recipe.form), output, recipe.form.reads)
        run.log(f"wrote {output.name}/")

    if recipe.decoder:
        train_decoder(model, run, seed, recipe, publish)


if __name__ == "__main__":
    main()
