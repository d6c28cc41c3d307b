"""The built-in models, their pictures and questions: the ruler by which pruning methods are measured.

Importing this package loads nothing heavy. `vtp.scenes.generator.pictures` and `vtp.scenes.exam` need numpy
and pillow only; `vtp.scenes.training.train` needs torch and transformers.
"""

from pathlib import Path

__all__ = ["examples_dir", "model_dir"]


def model_dir() -> Path:
    """Folder of the built-in LLaVA in Hugging Face layout."""
    return Path(__file__).resolve().parent / "model"


def examples_dir() -> Path:
    """Folder of the bundled pictures and their `questions.json`."""
    return Path(__file__).resolve().parent / "examples"
