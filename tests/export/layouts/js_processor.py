"""transformers.js' processors in plain Python, from the files of a folder: text and picture in, ids out.

Written after src/models/*/processing_*.js and src/tokenization_utils.js of npm @huggingface/transformers
4.3.2, and sharing nothing with the exporter. Pictures have the size that the model looks
at: nothing is resized.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from vtp.runtime.prompt.template import ChatTemplate


class JsProcessor:
    """What AutoProcessor makes of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = self.read("preprocessor_config.json")
        self.config = self.read("processor_config.json")
        self.words = self.read("tokenizer_config.json")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def read(self, name: str) -> dict[str, Any]:
        """One of the folder's JSON files."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def __call__(self, image: Image.Image, prompt: str) -> tuple[list[int], np.ndarray]:
        """ids [T] and pixel_values float32 [1,3,H,W]."""
        pixels = self.pixels(image)
        return self.tokenizer.encode(self.expanded(prompt, pixels)).ids, pixels

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Rescale in float32, then normalise channel by channel."""
        values = np.asarray(image.convert("RGB"), np.float32) * np.float32(self.images["rescale_factor"])
        mean, std = (np.array(self.images[name], np.float32) for name in ("image_mean", "image_std"))
        return ((values - mean) / std).astype(np.float32).transpose(2, 0, 1)[None]

    def expanded(self, prompt: str, pixels: np.ndarray) -> str:
        """The text that is tokenized."""
        return getattr(self, self.images["processor_class"])(prompt, pixels)

    def LlavaProcessor(self, prompt: str, pixels: np.ndarray) -> str:
        patch, token = self.config["patch_size"], self.config["image_token"]
        height, width = pixels.shape[-2:]
        count = (height // patch) * (width // patch) + self.config["num_additional_image_tokens"]
        return self.chat(prompt).replace(token, token * count, 1)

    def Idefics3Processor(self, prompt: str, pixels: np.ndarray) -> str:
        del pixels
        assert self.images["do_image_splitting"] is False  # else there are rows and columns
        inside = "<fake_token_around_image><global-img>" + "<image>" * self.config["image_seq_len"]
        before, after = self.chat(prompt).split("<image>")
        return before + inside + "<fake_token_around_image>" + after

    SmolVLMProcessor = Idefics3Processor

    def PaliGemmaProcessor(self, prompt: str, pixels: np.ndarray) -> str:
        del pixels
        return "<image>" * self.images["image_seq_length"] + self.words["bos_token"] + prompt + "\n"

    def Gemma3Processor(self, prompt: str, pixels: np.ndarray) -> str:
        del pixels
        begin, token, end = (self.words[name] for name in ("boi_token", "image_token", "eoi_token"))
        sequence = f"\n\n{begin}{token * self.config['image_seq_length']}{end}\n\n"
        return self.chat(prompt).replace(begin, sequence)

    def chat(self, prompt: str) -> str:
        """apply_chat_template's text: the file's where there is one, else tokenizer_config's."""
        file = self.folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.exists() else self.words["chat_template"]
        assert source == self.words["chat_template"]
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        special = {name: text for name, text in self.words.items() if name.endswith("_token")}
        messages = [{"role": "user", "content": content}]
        return ChatTemplate(source).render(messages=messages, add_generation_prompt=True, **special)
