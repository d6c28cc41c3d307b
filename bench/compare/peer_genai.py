"""onnxruntime-genai on the decoder alone, its graph made by its own model builder from the same weights."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.compare.peer import Peer, Run, Stopwatch
from vtp.bench.compare.peer_onnx import EXPORT, decoder_of
from vtp.engines.child import python_command
from vtp.engines.disk.whole import whole_folder

# The builder's options for both precisions: logits of the last prompt position only, as everybody has them.
_LAST = "prune_lm_head=true"
# Its quantiser's plain rounding, which `vtp.bench.common.fewer_bits` follows; the embedding stays in float,
# and int8 activations while multiplying are what vtp's own int4 has.
_INT4 = (
    "algo_config=default",
    "block_size=32",
    "is_symmetric=true",
    "accuracy_level=4",
    "op_types_to_quantize=MatMul",
    "shared_embeddings=false",
)


class Genai(Peer):
    """Its generator loop on given tokens, greedy, float32."""

    folder = "genai-float32"
    precision: tuple[str, ...] = ("-p", "fp32", "--extra_options", _LAST)

    needs = (
        ("onnxruntime_genai", "pip install 'vtp-edge[peers]'"),
        ("torch", EXPORT),
        ("transformers", EXPORT),
    )

    def made(self) -> Path:
        """Folder of the graph and genai_config.json."""
        return Path(self.spec.work) / self.folder

    def prepare(self) -> None:
        """Write the decoder as a text model, and let the builder make its graph."""
        import torch
        from transformers import LlavaForConditionalGeneration

        model: Any = LlavaForConditionalGeneration.from_pretrained(self.spec.model, dtype=torch.float32)
        with whole_folder(self.made()) as aside:
            text = aside / "model"
            decoder_of(model).save_pretrained(text)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(Path(self.spec.model) / name, text)
            command = python_command("onnxruntime_genai.models.builder")
            command += ["-i", str(text), "-o", str(aside), "-e", "cpu", "-c", str(text / "cache")]
            subprocess.run([*command, *self.precision], check=True)
            shutil.rmtree(text)

    def open(self) -> None:
        """Open the graph with the threads that all others have."""
        import onnxruntime_genai as genai

        self._genai = genai
        config = genai.Config(str(self.made()))
        options = {"intra_op_num_threads": self.spec.threads}
        # Without an end of sequence: as many tokens as asked for, whatever they are.
        config.overlay(json.dumps({"model": {"eos_token_id": [], "decoder": {"session_options": options}}}))
        self._model = genai.Model(config)

    def run(self) -> Run:
        """Prompt, then token by token."""
        watch, generator = Stopwatch(), self._start()
        while len(watch.tokens) < self.spec.tokens:
            generator.generate_next_token()
            watch.note(int(generator.get_next_tokens()[0]))
        return watch.run()

    def first_logits(self) -> np.ndarray:
        """See `Peer`."""
        return np.array(self._start().get_logits(), np.float32).reshape(-1)

    def _start(self) -> Any:
        """A generator that has read the prompt."""
        length = len(self.spec.ids) + self.spec.tokens
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length + 1, do_sample=False)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array([self.spec.ids], np.int32))
        return generator


class GenaiInt4(Genai):
    """The same with int4 weights, the head's included."""

    folder = "genai-int4"
    precision = ("-p", "int4", "--extra_options", _LAST, *_INT4)
