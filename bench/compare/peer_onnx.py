"""transformers' own OnnxExporter on ONNX Runtime, unpruned, its fusions for the CPU on.

Its export for generation leaves out a LLaVA's image encoder and projector, and puts the decoder's weights on
disk twice. So the parts are exported one by one with the same exporter: tower with projector (its unused last
layer falls away), and one decoder for prompt and steps, logits of the last position only.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.compare.peer import Peer, Run, Stopwatch
from vtp.bench.compare.peer_torch import processor, prompt
from vtp.engines.disk.whole import whole_folder
from vtp.engines.ort.library import load_onnxruntime

EXPORT = "pip install 'vtp-edge[export]'"


class TwoParts(Peer):
    """An image encoder and a decoder from one of transformers' exporters, and the greedy loop around them."""

    folder: str

    def made(self) -> Path:
        """Folder of the two graphs."""
        return Path(self.spec.work) / self.folder

    def prepare(self) -> None:
        """Export the two graphs; the folder appears when both are there."""
        with whole_folder(self.made()) as aside:
            for name, (module, inputs, dynamic) in parts(self.spec.model).items():
                self.export(module, inputs, dynamic).save_pretrained(aside / name)

    def open(self) -> None:
        """Open the graphs, the embedding and the processor."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.spec.model)
        self._image_id, text = config.image_token_id, config.text_config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.empty = (1, text.num_key_value_heads, 0, width)
        self._embedding = embedding(self.spec.model)
        self._processor = processor(self.spec.model, config)
        self.open_graphs()

    def run(self) -> Run:
        """Answer greedily."""
        watch = Stopwatch()
        logits, length = self._prefill()
        while True:
            watch.note(int(logits.argmax()))
            if len(watch.tokens) == self.spec.tokens:
                return watch.run()
            row = self._embedding[watch.tokens[-1]][None, None]
            logits = self.decode(row, np.array([[length]]))
            length += 1

    def first_logits(self) -> np.ndarray:
        """See `Peer`."""
        return self._prefill()[0]

    def _prefill(self) -> tuple[np.ndarray, int]:
        given = prompt(self._processor, self.spec.image, self.spec.prompt)
        image, ids = self.encode(given["pixel_values"].numpy()), given["input_ids"].numpy()
        embeds = self._embedding[ids]
        embeds[ids == self._image_id] = image.reshape(-1, embeds.shape[-1])
        self.forget()
        return self.decode(embeds, np.arange(ids.shape[1])[None]), ids.shape[1]

    @abstractmethod
    def export(self, module: Any, inputs: dict[str, Any], dynamic: bool) -> Any:
        """One part as transformers' ExportedModel."""

    @abstractmethod
    def open_graphs(self) -> None:
        """Open both graphs."""

    @abstractmethod
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """pixel_values [1,3,H,W] -> the projected rows of the picture."""

    @abstractmethod
    def forget(self) -> None:
        """Empty the cache."""

    @abstractmethod
    def decode(self, embeds: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Embeddings [1,S,D] at positions [1,S] -> logits [V] of the last; they join the cache."""


class TransformersOnnx(TwoParts):
    """Two sessions; keys and values go from one run's outputs to the next one's inputs without a copy."""

    needs = (("torch", EXPORT), ("transformers", EXPORT), ("onnxruntime", "pip install 'vtp-edge[ort]'"))
    folder = "transformers-onnx"

    def export(self, module: Any, inputs: dict[str, Any], dynamic: bool) -> Any:
        """With its fusions for ONNX Runtime's CPU provider."""
        from transformers.exporters import OnnxConfig, OnnxExporter

        return OnnxExporter().export(module, inputs, OnnxConfig(dynamic=dynamic, ort_fusions="cpu"))

    def open_graphs(self) -> None:
        """See `TwoParts`."""
        ort = load_onnxruntime()

        options = ort.SessionOptions()
        options.intra_op_num_threads = self.spec.threads
        # As vtp asks: no sums that saturate, on a processor without VNNI.
        options.add_session_config_entry("session.x64quantprecision", "1")
        self._ort = ort
        self._encoder, self._decoder = (
            ort.InferenceSession(str(self.made() / name / "model.onnx"), options)
            for name in ("encoder", "decoder")
        )
        self._pasts = [one.name for one in self._decoder.get_inputs() if "past_key_values" in one.name]
        self._presents = [one.name for one in self._decoder.get_outputs() if "past_key_values" in one.name]

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """See `TwoParts`."""
        return self._encoder.run(None, {self._encoder.get_inputs()[0].name: pixels})[0]

    def forget(self) -> None:
        """See `TwoParts`."""
        empty = np.zeros(self.empty, np.float32)
        self._cache = [self._ort.OrtValue.ortvalue_from_numpy(empty) for _ in self._pasts]

    def decode(self, embeds: np.ndarray, places: np.ndarray) -> np.ndarray:
        """See `TwoParts`."""
        io = self._decoder.io_binding()
        io.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds))
        io.bind_cpu_input("position_ids", places)
        for name, value in zip(self._pasts, self._cache, strict=True):
            io.bind_ortvalue_input(name, value)
        for name in ("logits", *self._presents):
            io.bind_output(name, "cpu")
        self._decoder.run_with_iobinding(io)
        logits, *self._cache = io.get_outputs()
        return np.array(logits.numpy()).reshape(-1)


def embedding(folder: str) -> np.ndarray:
    """The token embedding [V,D] float32, mapped from the checkpoint's file."""
    from safetensors import safe_open

    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is not a dictionary
                if name.endswith("embed_tokens.weight"):
                    return tensors.get_tensor(name).astype(np.float32, copy=False)
    raise FileNotFoundError(f"no token embedding in {folder}")


def parts(folder: str) -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """The two modules to export, with example inputs and whether their axes vary."""
    import torch
    from transformers import DynamicCache, LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    size, text = model.config.vision_config.image_size, model.config.text_config
    causal, cache = decoder_of(model), DynamicCache(config=text)
    with torch.no_grad():
        causal(inputs_embeds=torch.randn(1, 5, text.hidden_size), past_key_values=cache, use_cache=True)
    decoder_inputs = {
        "inputs_embeds": torch.randn(1, 3, text.hidden_size),
        "position_ids": torch.arange(5, 8)[None],
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    return {
        "encoder": (_encoder(model), {"pixel_values": torch.randn(1, 3, size, size)}, False),
        "decoder": (causal, decoder_inputs, True),
    }


def decoder_of(model: Any) -> Any:
    """The decoder as its own transformers class for text alone, on the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(model.config.text_config)
    causal.model, causal.lm_head = model.model.language_model, model.lm_head
    return causal.eval()


def _encoder(model: Any) -> Any:
    from transformers import PreTrainedModel

    class ImageEncoder(PreTrainedModel):
        """pixel_values [1,3,H,W] -> image_embeds [N,D]."""

        config_class = type(model.config)
        _supports_sdpa = True

        def __init__(self) -> None:
            super().__init__(model.config)
            self.whole = model.model

        def forward(self, pixel_values: Any) -> Any:
            return {
                "image_embeds": self.whole.get_image_features(pixel_values, return_dict=True).pooler_output[0]
            }

    return ImageEncoder().eval()
