"""A written folder, driven as transformers.js drives it, on ONNX Runtime's CPU provider.

Source: `generate` and `image_text_to_text_forward` of npm @huggingface/transformers 4.3.2,
src/models/modeling_utils.js: an empty cache of the shapes that the decoder's inputs say, rows of
image_features in the places of the image tokens, a mask of ones that grows.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines.ort.library import load_onnxruntime

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}


class Rehearsal:
    """The three sessions of a folder, opened as its config.json says."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._folder, self._threads = folder, threads
        self._vision, self._embed, self._decoder = (
            self._open(name) for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )

    def image_features(self, pixel_values: np.ndarray) -> np.ndarray:
        """pixel_values float32 [n,3,H,W] -> image_features [n*K,D]."""
        return self.look(pixel_values)[0]

    def look(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """pixel_values float32 [n,3,H,W] -> image_features [n*K,D], keep_indices [n*K] or None."""
        feeds = {"pixel_values": pixel_values}
        for value in self._vision.get_inputs():
            if value.name == "pixel_attention_mask":
                feeds = {"pixel_values": pixel_values[None]}
                feeds[value.name] = np.ones((1, *pixel_values.shape[:1], *pixel_values.shape[2:]), bool)
        features, *kept = self._vision.run(None, feeds)
        return features.reshape(-1, features.shape[-1]), kept[0].reshape(-1) if kept else None

    def logits(self, ids: Sequence[int], features: np.ndarray) -> Generator[np.ndarray, int, None]:
        """Logits [V] after the prompt, and after every id that is sent in.

        ids hold an image token for every row of `features`. Raises ValueError where they do not.
        """
        tokens, mask = np.array([ids]), np.ones((1, len(ids)), np.int64)
        embeds = self._embed.run(["inputs_embeds"], {"input_ids": tokens})[0]
        places = tokens[0] == self.config["image_token_id"]
        if int(places.sum()) != len(features):
            raise ValueError(f"Number of tokens and features do not match: {places.sum()}, {len(features)}")
        embeds[0, places] = features
        cache = self._empty()
        while True:
            feeds = {"inputs_embeds": embeds, "attention_mask": mask, **cache}
            names = [value.name for value in self._decoder.get_outputs()]
            given = dict(zip(names, self._decoder.run(names, feeds), strict=True))
            chosen = yield given.pop("logits")[0, -1]
            cache = {name.replace("present", "past_key_values"): value for name, value in given.items()}
            embeds = self._embed.run(["inputs_embeds"], {"input_ids": np.array([[chosen]])})[0]
            mask = np.concatenate([mask, np.ones((1, 1), np.int64)], axis=1)

    def answer(self, ids: Sequence[int], features: np.ndarray, most: int) -> list[int]:
        """Greedy token ids, the ending one among them, at most `most`."""
        settings = json.loads((self._folder / "generation_config.json").read_text(encoding="utf-8"))
        stream, found = self.logits(ids, features), list[int]()
        row = next(stream)
        while len(found) < most:
            found.append(int(row.argmax()))
            if found[-1] in settings["eos_token_id"]:
                break
            row = stream.send(found[-1])
        return found

    def _open(self, name: str) -> Any:
        settings = self.config["transformers.js_config"]
        suffix = SUFFIXES[settings["dtype"][name]]
        library = load_onnxruntime()
        options = library.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        # int8 sums that saturate without VNNI are this processor's, not the folder's
        options.add_session_config_entry("session.x64quantprecision", "1")
        file = self._folder / "onnx" / f"{name}{suffix}.onnx"
        return library.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def _empty(self) -> dict[str, np.ndarray]:
        """The cache before the first run: of the axes with names only the batch is not 0."""
        sizes = {"batch_size": 1}
        return {
            value.name: np.zeros(
                [axis if isinstance(axis, int) else sizes.get(axis, 0) for axis in value.shape],
                _NUMPY[value.type],
            )
            for value in self._decoder.get_inputs()
            if value.name.startswith("past_key_values.")
        }


# What transformers.js puts behind a graph's name, by its word for a dtype.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q4": "_q4", "q4f16": "_q4f16"}
