"""A LLaVA in Hugging Face layout as the converter reads it: its config and its tensors, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines import VtpError

TEXT, TOWER, PROJECTOR = "language_model.model.", "vision_tower.", "multi_modal_projector."
HEAD = "language_model.lm_head.weight"
# Checkpoints before transformers 5 name the tower's tensors with one more level.
_OLDER = {TOWER: "vision_tower.vision_model."}


class Checkpoint:
    """The folder of a LLaVA. Raises VtpError for another architecture."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoConfig

        self.folder = Path(folder)
        self.config: Any = AutoConfig.from_pretrained(str(folder))
        if self.config.model_type != "llava":
            raise VtpError(f"{folder} is a {self.config.model_type}; the GGUF converter takes llava alone")
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

    def _stored(self, name: str) -> str:
        for begin, older in _OLDER.items():
            if name.startswith(begin) and name not in self._places:
                return older + name.removeprefix(begin)
        return name


def _places(folder: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it."""
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places
