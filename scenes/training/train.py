"""Trains the built-in model from nothing, with resume: `python -m vtp.scenes.training.train`."""

import argparse
from pathlib import Path

from transformers import LlavaForConditionalGeneration

from vtp.scenes import model_dir
from vtp.scenes.training.checkpoint import Run
from vtp.scenes.training.decoder import train_decoder
from vtp.scenes.training.deepen import deepen
from vtp.scenes.training.folder import build_model, save
from vtp.scenes.training.mixed import register_attention, settle_memory
from vtp.scenes.training.train_tower import train_tower


def main() -> None:
    """Parse the command line and train, or only write a randomly initialised model."""
    parser = argparse.ArgumentParser(prog="python -m vtp.scenes.training.train", description=__doc__)
    parser.add_argument(
        "--run", type=Path, default=Path("build/scenes"), help="folder of checkpoints and log"
    )
    parser.add_argument(
        "--output", type=Path, default=model_dir(), help="folder of the model (default: built-in)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--init-only", action="store_true", help="write a randomly initialised model and stop"
    )
    options = parser.parse_args()
    model = build_model(options.seed)
    if options.init_only:
        save(model, options.output)
        return
    settle_memory()
    model.set_attn_implementation(register_attention())
    run = Run(options.run)
    train_tower(model.model.vision_tower, run, options.seed)

    def publish(trained: LlavaForConditionalGeneration) -> None:
        save(deepen(trained), options.output)
        run.log(f"wrote {options.output.name}/")

    train_decoder(model, run, options.seed, publish)


if __name__ == "__main__":
    main()
