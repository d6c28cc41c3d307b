"""The built-in models, their pictures and questions: the ruler by which pruning methods are measured.

Importing this package loads nothing heavy. `vtp.scenes.generator.pictures` and `vtp.scenes.exam` need numpy
and pillow only; `vtp.scenes.training.train` needs torch and transformers.
"""

from pathlib import Path

from vtp.engines import UsageError

__all__ = ["examples_dir", "model_dir"]


MODELS = ("model", "reader")


def model_dir(name: str = "model") -> Path:
    """Folder of a built-in LLaVA in Hugging Face layout; raises UsageError for a name not in `MODELS`.

    "model" is the first; "reader" the second, whose tower has twelve used blocks and which also reads signs.
    """
    if name not in MODELS:
        raise UsageError(f"no built-in model is called {name!r}; choose {' or '.join(MODELS)}")
    folder = Path(__file__).resolve().parent / name
    if not folder.is_dir():
        raise UsageError(
            f"the built-in model {name!r} is not in this copy of vtp; give another model, --model DIR, or "
            f"build vtp from its sources with VTP_MODELS={name}"
        )
    return folder


def examples_dir() -> Path:
    """Folder of the bundled pictures and their `questions.json`."""
    return Path(__file__).resolve().parent / "examples"
