"""A model in Hugging Face layout as the converter reads it: its config and its tensors, one at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines import VtpError


@dataclass(frozen=True)
class Layout:
    """How the names of an architecture's tensors begin: decoder, tower, projector; and its head's whole name.

    older  what begins in place of `tower` in checkpoints before transformers 5, if that is another name
    """

    text: str
    head: str
    tower: str
    projector: str
    older: str = ""


_LLAVA = Layout(
    text="language_model.model.",
    head="language_model.lm_head.weight",
    tower="vision_tower.",
    projector="multi_modal_projector.",
    older="vision_tower.vision_model.",
)
_IDEFICS3 = Layout(
    text="model.text_model.",
    head="lm_head.weight",
    tower="model.vision_model.",
    projector="model.connector.",
)
LAYOUTS = {"llava": _LLAVA, "idefics3": _IDEFICS3, "smolvlm": _IDEFICS3}


class Checkpoint:
    """The folder of a LLaVA, Idefics3 or SmolVLM. Raises VtpError for another architecture."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoConfig

        self.folder = Path(folder)
        self.config: Any = AutoConfig.from_pretrained(str(folder))
        self.kind: str = self.config.model_type
        if self.kind not in LAYOUTS:
            raise VtpError(f"{folder} is a {self.kind}; the GGUF converter takes one of {', '.join(LAYOUTS)}")
        self.layout = LAYOUTS[self.kind]
        self._places = _places(self.folder)

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._places

    def tensor(self, name: str) -> np.ndarray:
        """The tensor of that name, float32. Raises VtpError if the checkpoint does not have it."""
        from safetensors import safe_open

        stored = self._stored(name)
        if stored not in self._places:
            raise VtpError(f"{self.folder} has no tensor {name}")
        with safe_open(self._places[stored], framework="pt") as file:
            found: np.ndarray = file.get_tensor(stored).float().numpy()
        return found

    def json(self, name: str) -> Any:
        """What a JSON file of the folder holds."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def image_processor(self) -> Any:
        """transformers' image processor of the folder, the one that works with Pillow."""
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(str(self.folder), backend="pil")

    def _stored(self, name: str) -> str:
        layout = self.layout
        if layout.older and name.startswith(layout.tower) and name not in self._places:
            return layout.older + name.removeprefix(layout.tower)
        return name


def _places(folder: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it."""
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places
