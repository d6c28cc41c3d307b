"""llama.cpp on the same weights, all tokens: its server, opened once, asked for one answer after the other.

Its server is used, for `llama-mtmd-cli` opens the model anew for each picture. The picture is cropped and
resized beforehand, which is left out of its time. First and further tokens: from the request to the answer's
last token by the wall clock, of which llama.cpp's own report says how long the further tokens took.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.compare.llamacpp.built import COMMAND, is_built
from vtp.bench.compare.llamacpp.convert import text_file, text_path, vision_file, vision_path
from vtp.bench.compare.llamacpp.report import reported
from vtp.bench.compare.llamacpp.server import LlamaServer
from vtp.bench.compare.peer import Peer, Run
from vtp.bench.compare.peer_onnx import EXPORT
from vtp.bench.compare.peer_torch import Torch, processor, prompt_words
from vtp.engines import VtpError

_ROOM = 8  # positions beside the prompt's and the answer's


class LlamaCpp(Peer):
    """Image encoder in float32, decoder in float16, the most that llama.cpp is run with."""

    needs = (("gguf", "pip install 'vtp-edge[peers]'"), ("torch", EXPORT), ("transformers", EXPORT))
    vision, text = "f32", "f16"
    more: tuple[str, ...] = ()
    _server: LlamaServer | None = None

    @classmethod
    def lacking(cls) -> str:
        """See `Peer`; the binaries count as well."""
        return super().lacking() or ("" if is_built() else COMMAND)

    @property
    def folder(self) -> Path:
        """Where the GGUF files lie, which all of these peers share."""
        return Path(self.spec.work) / "llamacpp"

    def made(self) -> Path:
        """The first of its two files that is not there; the last one if both are."""
        files = (vision_path(self.folder, self.vision), text_path(self.folder, self.text))
        return next((file for file in files if not file.exists()), files[-1])

    def prepare(self) -> None:
        """Write both."""
        vision_file(self.spec.model, self.folder, self.vision)
        text_file(self.spec.model, self.folder, self.text)

    def open(self) -> None:
        """Start the server, and say the prompt as it wants it."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.spec.model)
        made = processor(self.spec.model, config)
        self._picture = picture(made.image_processor, self.spec.image)
        self._vocabulary = config.text_config.vocab_size
        self._start(made.tokenizer, halves(made, self.spec.prompt), config.image_seq_length)

    def _start(self, tokenizer: Any, parts: tuple[str, str], visual: int) -> None:
        """Start the server on a prompt's words in front of the picture and behind it, and `visual` tokens."""
        before, after = parts
        ids = [tokenizer(part, add_special_tokens=False).input_ids for part in parts]
        self._letter = tokenizer("a", add_special_tokens=False).input_ids[0]
        self._length = sum(map(len, ids)) + visual
        server = self._server = LlamaServer(
            text_path(self.folder, self.text),
            vision_path(self.folder, self.vision),
            self.spec.threads,
            self.folder / f"server-{self.vision}-{self.text}.log",
            more=("--ctx-size", str(self._length + self.spec.tokens + _ROOM), *self.more),
        )
        _check_words(server, parts, ids)
        self._prompt = before + server.marker + after

    def close(self) -> None:
        """End the server."""
        if self._server:
            self._server.close()

    @property
    def pid(self) -> int:
        """Whose memory counts: the server's."""
        return self._opened.pid

    @property
    def _opened(self) -> LlamaServer:
        assert self._server is not None  # `open` was called
        return self._server

    def run(self) -> Run:
        """Answer once. VtpError if the prompt had another number of tokens than everybody's."""
        server = self._opened
        seen, start = server.log.stat().st_size, time.perf_counter()
        answer = self._ask(n_predict=self.spec.tokens, return_tokens=True)
        wall, timings = (time.perf_counter() - start) * 1e3, answer["timings"]
        found = reported(timings, server.logged(seen))
        if found.tokens != self._length:
            raise VtpError(f"llama.cpp read {found.tokens} tokens of a prompt of {self._length}")
        parts = {"prompt": found.prompt} | ({"encoder": found.encoder} if found.encoder else {})
        return Run(answer["tokens"], wall - timings["predicted_ms"], found.token, parts)

    def first_logits(self) -> np.ndarray:
        """Log-probabilities, which are the logits less a constant.

        They are those before a token is chosen, but are told of whole characters alone: one is forced.
        """
        size = self._vocabulary
        answer = self._ask(n_predict=1, n_probs=size, logit_bias=[[self._letter, 1e4]])
        logits = np.full(size, -np.inf, np.float32)
        for one in answer["completion_probabilities"][0]["top_logprobs"]:
            logits[one["id"]] = one["logprob"]
        return logits

    def _ask(self, **more: Any) -> Any:
        """One answer, greedy, nothing kept from the one before, no end of sequence."""
        asked = {"prompt": {"prompt_string": self._prompt, "multimodal_data": [self._picture]}}
        greedy = {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"]}
        return self._opened.ask(
            "/completion", {**asked, **greedy, "cache_prompt": False, "ignore_eos": True, **more}
        )


class LlamaCppQ8(LlamaCpp):
    """Both in q8_0."""

    vision, text = "q8_0", "q8_0"


class LlamaCppQ4(LlamaCpp):
    """Image encoder in q8_0, decoder in q4_0."""

    vision, text = "q8_0", "q4_0"


class LlamaCppQ4Text(LlamaCpp):
    """Image encoder in float32, decoder in q4_0: what one gets who quantises the decoder alone."""

    vision, text = "f32", "q4_0"


class TorchClassLast(Torch):
    """transformers with CLIP's rows in llama.cpp's order: what its answer is held against, and never timed.

    Its graph puts the class row behind the patches, counts places as if it were in front, and drops the first
    row, which is then a patch (ggml-org/llama.cpp, issue 25814). SigLIP has no class row and stays as it is.
    """

    def open(self) -> None:
        """Load, and turn the rows."""
        super().open()
        embeddings = self.model.model.vision_tower.embeddings
        if hasattr(embeddings, "class_embedding"):
            embeddings.register_forward_hook(class_last)


def class_last(embeddings: Any, _given: Any, rows: Any) -> Any:
    """Rows [1,1+N,C] of class and patches with their places -> patches and class with the same places."""
    places = embeddings.position_embedding.weight
    return (rows - places).roll(-1, dims=1) + places


def _check_words(server: LlamaServer, parts: Sequence[str], ids: Sequence[list[int]]) -> None:
    for part, wanted in zip(parts, ids, strict=True):
        found = server.ask("/tokenize", {"content": part, "parse_special": True})["tokens"]
        if found != wanted:
            raise VtpError(f"llama.cpp cuts {part!r} into other tokens than the model's own tokenizer")


def halves(made: Any, text: str) -> tuple[str, str]:
    """The prompt's words in front of the picture and behind it, specials that the tokenizer adds included."""
    begins = made.tokenizer.decode(made.tokenizer("").input_ids)
    words = prompt_words(made, text)
    before, after = words.split(made.image_token)
    return (before if words.startswith(begins) else begins + before), after


def picture(processor: Any, path: str) -> str:
    """A picture as base64 of a PNG, cropped and resized as the model's processor does it."""
    from PIL import Image

    given = processor(
        Image.open(path).convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np"
    )
    pixels = np.asarray(given["pixel_values"])[0].round().clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
