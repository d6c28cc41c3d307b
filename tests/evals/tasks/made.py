"""What made.yaml needs: a question's picture and prompt, as lmms-eval asks for them."""

from __future__ import annotations

from typing import Any

from PIL import Image


def pictures(doc: dict[str, Any]) -> list[Image.Image]:
    """The question's picture."""
    return [Image.open(doc["image"]).convert("RGB")]


def prompt(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The question's prompt."""
    return str(doc["prompt"])
